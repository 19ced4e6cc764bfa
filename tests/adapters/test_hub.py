from __future__ import annotations

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from rosa_lightning.adapters.hub import check_push, push


@pytest.mark.parametrize("private", [False, True])
def test_all_files_of_the_folder_are_pushed_to_a_repository_of_that_name(hub, tmp_path, private):
    for name in ("README.md", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    check_push("ann/reader")
    assert push(tmp_path, "ann/reader", private=private) == "https://huggingface.co/ann/reader"
    assert hub.calls == [
        ("whoami",),
        ("create_repo", "ann/reader", private or None, True),  # None: as the user's hub settings
        ("upload_folder", "ann/reader", ["README.md", "adapter_config.json"]),
    ]


@pytest.mark.parametrize("name", ["reader", "a/b/c", "ann/", "ann/-x", "ann/a..b", ""])
def test_what_is_no_name_of_a_repository_is_refused(hub, name):
    with pytest.raises(ValueError, match=r"Give USER/") as caught:
        check_push(name)
    assert "\n" not in str(caught.value)
    assert hub.calls == []


def test_what_the_hub_refuses_is_one_line(hub, tmp_path):
    hub.fails["whoami"] = LocalTokenNotFoundError("Token is required\n...")
    with pytest.raises(OSError, match=r"nobody is logged in to the hub\. Run hf auth login"):
        check_push("ann/reader")
    hub.fails["whoami"] = ConnectionError("no\nroute")
    with pytest.raises(OSError, match=r"cannot be reached: no route\. .*Nothing was written"):
        check_push("ann/reader")
    for name in ("create_repo", "upload_folder"):
        hub.fails = {name: RuntimeError("403\nForbidden")}
        with pytest.raises(OSError, match=r"is written, and could not be pushed .*403 Forbidden"):
            push(tmp_path, "ann/reader")
