"""What is saved, and for whom: checkpoints, adapter folders, PEFT LoRA and merged models."""
