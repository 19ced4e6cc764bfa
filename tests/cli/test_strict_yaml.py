from __future__ import annotations

import pytest
import yaml

from rosa_lightning.cli.strict_yaml import StrictYAMLError, check_yaml, read_configuration

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]" for n in range(8)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n  base: a\ndata: {}\nmodel:\n  dtype: auto\n", "line 4: the key model stands a"),
        ("model: {base: a, dtype: auto, base: b}", "line 1: the key model.base stands a second"),
        ("data:\n  sources:\n  - {path: a, path: b}", "line 3: the key data.sources.0.path stands"),
        (BOMB, "aliases make more than 10,000 values"),
        ("a: &a {b: [*a]}", "nested deeper than 64"),
        ("a: " + "[" * 90 + "]" * 90, "nested deeper than 64"),
        ("a: " + "[" * 20_000 + "]" * 20_000, "depth"),
        ("\n".join("  " * n + "a:" for n in range(200)), "nested deeper than 64"),
        ("a: [\n", "line 2, column 1"),
        ("a: !!python/object:os.system {}", "line 1: a has the tag tag:yaml.org,2002:python"),
        ("? [a]\n: b", "a key is a list or a mapping"),
    ],
)
def test_yaml_that_says_two_things_or_too_much_is_refused_with_its_line(text, words):
    with pytest.raises(StrictYAMLError) as caught:
        check_yaml(text, "file.yaml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("file.yaml, ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {b: 1}\nc: *x\nd: [*x, *x]",
        "base: &b {r: 1, s: 2}\nroae: {<<: *b, r: 3}",
        "[1, 2, 3]",
        "just text",
        "",
        "scheduling: {4: 2, 8: 3}",
        "many: [" + "0, " * 12_000 + "0]",
    ],
)
def test_other_yaml_passes(text):
    check_yaml(text)
    yaml.safe_load(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; expected keys such as model"),
        (b"# only a comment\n", "is empty"),
        (b"[1, 2]", "holds no keys"),
        (b"{}", "holds no keys"),
        (b"model:\n  base: \xff\xfe", "is not UTF-8: line 2 holds the byte 0xff"),
        (b"#" * (4 * 2**20 + 1), "is larger than 4 MiB"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, content, words):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(StrictYAMLError) as caught:
        read_configuration(path)
    assert f"the configuration {path} " in str(caught.value)
    assert words in str(caught.value)


def test_files_that_cannot_be_read_or_do_not_end_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing", "a\0b", "/dev/zero"):
        with pytest.raises(StrictYAMLError, match="the configuration "):
            read_configuration(path)


def test_a_byte_order_mark_is_no_part_of_a_configuration(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: {base: tiny}")
    assert yaml.safe_load(read_configuration(path)) == {"model": {"base": "tiny"}}
