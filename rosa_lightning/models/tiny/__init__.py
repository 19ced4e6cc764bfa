"""The embedded base model and its demonstration set: `model.base: tiny`, `data.sources: demo`.

`tests/tiny_model` made every file in this folder: `recipe.py` from the text of `problems.py`.
"""

from pathlib import Path


def folder() -> Path:
    """Folder that holds the model, its tokenizer, `demo_train.jsonl` and `demo_test.jsonl`.

    `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read it.
    """
    return Path(__file__).parent
