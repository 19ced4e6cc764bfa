"""From a batch to its gradients: the loss and all that makes a step faster or smaller."""
