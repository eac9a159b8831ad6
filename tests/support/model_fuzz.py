"""Model folders with faults, and what must become of every one: refused in one line, or served."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.errors import QuantError
from service.errors import StartupError
from service.host.model_host import ModelHost
from service.host.reloader import open_host
from service.settings import Settings
from tests.support.harness import app_over, client_of
from tests.support.tokenizers import TEMPLATE

T = TypeVar("T")


class Draw(Protocol):
    """Draws a value, as `data.draw` of a property does."""

    def __call__(self, strategy: st.SearchStrategy[T], /) -> T: ...


JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
Json = Any

CONFIG_WORDS = [
    "llama", "mistral", "qwen3_moe", "gpt2", "bert", "gelu", "silu", "relu", "float16", "bfloat16", "nn", "default",
    "linear", "llama3", "yarn", "longrope", "dynamic", "full_attention", "sliding_attention", "<|end|>", "../x",
]  # fmt: skip
CONFIG_KEYS = [
    "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "rope_parameters",
    "rope_scaling", "rope_theta", "rope_type", "factor", "partial_rotary_factor", "original_max_position_embeddings",
    "short_factor",
    "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "mscale", "tie_word_embeddings", "dtype",
    "torch_dtype", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_only_layers",
    "decoder_sparse_step", "norm_topk_prob", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "eos_token_id", "bos_token_id", "pad_token_id", "auto_map", "num_labels", "id2label",
    "per_layer_config", "quantization_config", "configuration_files", "architectures", "attn_implementation",
    "is_encoder_decoder", "n_inner", "n_layer", "n_embd", "rotary_pct", "use_bidirectional_attention", "__class__",
]  # fmt: skip
TOKENIZER_KEYS = [
    "added_tokens", "id", "content", "special", "lstrip", "normalized", "single_word", "normalizer", "pre_tokenizer",
    "post_processor", "decoder", "model", "type", "vocab", "merges", "unk_token", "byte_fallback", "dropout",
    "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "ignore_merges", "truncation", "padding",
    "max_length", "stride", "pattern", "String", "Regex", "behavior", "invert", "prepend", "replacement",
    "prepend_scheme", "normalizers", "pretokenizers", "decoders", "processors", "single", "pair", "special_tokens",
    "SpecialToken", "Sequence", "type_id", "ids", "tokens", "cls", "sep", "add_prefix_space", "trim_offsets",
]  # fmt: skip
TOKENIZER_WORDS = [
    "BPE", "WordPiece", "WordLevel", "Unigram", "ByteLevel", "Metaspace", "Whitespace", "Split", "Sequence", "Prepend",
    "Replace", "NFKC", "Strip", "Fuse", "ByteFallback", "TemplateProcessing", "BertProcessing", "Isolated", "A", "a",
    "<|end|>", "<|bos|>", "(", "(a|a)*$", "Lowercase", "Precompiled", "LongestFirst", "Right", "BatchLongest",
]  # fmt: skip
OTHER_KEYS = [
    "chat_template", "eos_token", "bos_token", "unk_token", "content", "tokenizer_class", "temperature", "top_p",
    "top_k", "repetition_penalty", "eos_token_id", "do_sample", "name", "template", "added_tokens_decoder",
    "model_max_length", "auto_map", "extra_special_tokens",
]  # fmt: skip
OTHER_WORDS = ["<|end|>", "<|bos|>", "none", "default", "tool_use", "{{", TEMPLATE, "LlamaTokenizer", "../other"]


def _values(words: Sequence[str], keys: Sequence[str]) -> st.SearchStrategy[Json]:
    leaves = (
        st.none()
        | st.booleans()
        | st.sampled_from([-1, 0, 1, 2, 3, 64, 128, 340, 341, 10**6, 2**31, 2**32 - 1, 2**63, 10**30])
        | st.sampled_from([0.0, -1.5, 0.5, 1e-5, 1e300, float("inf"), float("nan")])
        | st.sampled_from(words)
        | st.text(max_size=3)
    )
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(keys), inner, max_size=3)
    )


KEYS = {"config.json": CONFIG_KEYS, "tokenizer.json": TOKENIZER_KEYS}
VALUES = {
    "config.json": _values(CONFIG_WORDS, CONFIG_KEYS),
    "tokenizer.json": _values(TOKENIZER_WORDS, TOKENIZER_KEYS),
}
OTHER_VALUES = _values(OTHER_WORDS, OTHER_KEYS)


def changed(draw: Draw, node: Json, file: str) -> Json:
    """A JSON tree with one node, reached by a random walk, replaced, left out or added."""
    keys, values = KEYS.get(file, OTHER_KEYS), VALUES.get(file, OTHER_VALUES)
    if isinstance(node, list) and node:
        node = list(node)
        place: int = draw(st.integers(0, len(node) - 1))
        if isinstance(node[place], dict | list) and draw(st.integers(0, 4)):
            node[place] = changed(draw, node[place], file)
        elif draw(st.booleans()):
            del node[place]
        else:
            node[place] = draw(values)
        return node
    if not isinstance(node, dict):
        return draw(values)
    node = copy.copy(node)
    own = [key for key in node if isinstance(node[key], dict | list)] if draw(st.booleans()) else list(node)
    key: str = draw(st.sampled_from(own if draw(st.integers(0, 4)) and own else keys))
    if isinstance(node.get(key), dict | list) and draw(st.integers(0, 7)):
        node[key] = changed(draw, node[key], file)
    elif key in node and draw(st.integers(0, 2)) == 0:
        del node[key]
    else:
        node[key] = draw(values)
    return node


def change_json(draw: Draw, folder: Path, file: str) -> None:
    """Change one to three nodes of a JSON file, or create it."""
    path = folder / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    for _ in range(draw(st.integers(1, 3))):
        content = changed(draw, content, file)
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")


DEEP = 200_000
"""Levels of brackets: more than any recursive reader has stack for."""


def break_file(draw: Draw, folder: Path, file: str) -> None:
    """Cut a file, or put something else in its place."""
    path = folder / file
    whole = path.read_bytes() if path.is_file() else b"{}"
    path.unlink(missing_ok=True)
    how = draw(
        st.sampled_from(["cut", "flip", "empty", "gone", "folder", "pipe", "nowhere", "deep", "bytes", "number"])
    )
    if how == "cut":
        path.write_bytes(whole[: draw(st.integers(0, len(whole)))])
    elif how == "flip":
        damaged = bytearray(whole)
        for _ in range(draw(st.integers(1, 4))):
            damaged[draw(st.integers(0, min(len(damaged), 400) - 1))] = draw(st.integers(0, 255))
        path.write_bytes(damaged)
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "nowhere":
        path.symlink_to(folder / "nowhere")
    elif how != "gone":
        contents = {"deep": b"[" * DEEP, "bytes": b"\xff\xfe\x00{", "number": b"9" * 5000, "empty": b""}
        path.write_bytes(contents[how])


DTYPES = [torch.float16, torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn]


def change_tensors(draw: Draw, folder: Path) -> None:
    """Leave tensors out, add some, or change their shape, type or values."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from([name for name in sorted(tensors) if tensors[name].numel()]))
        tensors |= _changed_tensor(draw, name, tensors.pop(name))
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def _changed_tensor(draw: Draw, name: str, tensor: Tensor) -> dict[str, Tensor]:
    how = draw(st.sampled_from(["gone", "renamed", "extra", "shape", "flat", "dtype", "nan", "inf", "large", "empty"]))
    if how == "gone":
        return {}
    if how == "renamed":
        return {name.replace("model.", ""): tensor}
    if how == "extra":
        other = draw(st.sampled_from([f"{name}_scale", f"{name}\n", f"{name}.weight", "x" * 5000, "é\0"]))
        return {name: tensor, other: tensor.flatten()[:1].float().clone()}
    if how == "shape":
        return {name: torch.cat((tensor, tensor))}
    if how == "flat":
        return {name: tensor.flatten() if tensor.ndim > 1 else tensor[None]}
    if how == "dtype":
        return {name: tensor.float().to(draw(st.sampled_from(DTYPES)))}
    if how == "empty":
        return {name: tensor[:0]}
    value = {"nan": float("nan"), "inf": float("inf"), "large": 3e38}[how]
    filled = tensor.clone()
    if filled.is_floating_point():
        filled.view(-1)[draw(st.integers(0, filled.numel() - 1))] = value
    return {name: filled}


ENTRIES: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.sampled_from(["dtype", "shape", "data_offsets", "more"]),
    st.sampled_from(
        ["F32", "I8", "X", 1, None, [], [1], [2, 3], [0, 4], [-1, 4], [2**62, 2**62], [4, 0], [0.5, 1], {}]
    ),
)


def change_header(draw: Draw, folder: Path) -> None:
    """Change the header of a safetensors file, or the length that it claims."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    name = draw(st.sampled_from(sorted(header)))
    header[name] = draw(ENTRIES) if draw(st.booleans()) else {**header[name], **draw(ENTRIES)}
    text = draw(st.sampled_from([json.dumps(header).encode(), b"[" * DEEP, b"[]", b"1e999", b'{"a": NaN}']))
    claimed = draw(st.sampled_from([len(text), 0, len(text) + 1, 2**40, 2**64 - 1]))
    path.unlink()
    path.write_bytes(claimed.to_bytes(8, "little") + text + data)


PLACES = [
    "a.safetensors",
    "b.safetensors",
    "..",
    ".",
    "",
    "../b.safetensors",
    "/etc/passwd",
    "config.json",
    "gone",
    "a\0b",
]


def shard(draw: Draw, folder: Path) -> None:
    """Two files and an index, whose entries may be wrong."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    index: dict[str, Json] = {name: file for file, own in parts.items() for name in own}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from([*names, "another"]))
        if draw(st.integers(0, 3)):
            index[name] = draw(st.sampled_from(PLACES) | st.text(max_size=3) | st.sampled_from([None, 1, [], {}]))
        else:
            index.pop(name, None)
    content: Json = {"weight_map": index}
    if draw(st.integers(0, 5)) == 0:
        content = draw(st.sampled_from([[], {}, {"weight_map": []}, {"weight_map": None}, {"weight_map": {}}, 1]))
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    if draw(st.integers(0, 5)) == 0:
        break_file(draw, folder, draw(st.sampled_from(["a.safetensors", "model.safetensors.index.json"])))


ATOMS = [
    "m", "m.role", "m.content", "messages", "messages[0]", "messages[0].content", "messages[-1]['role']", "tools", "x",
    "bos_token", "eos_token", "loop", "loop.index", "loop.first", "none", "true", "1", "10**9", "'a'", "'<|user|>'",
    "[]", "{}", "{'a': 1}", "ns", "ns.found", "namespace(found=false)", "range(3)", "range(10**12)",
    "strftime_now('%d %b %Y')",
    "raise_exception('no')", "strftime_now(1)", "self", "caller", "cycler", "joiner()", "lipsum", "m.__class__",
    "''.__class__.__mro__", "messages.append", "add_generation_prompt", "enable_thinking", "undefined_name",
]  # fmt: skip
FILTERS = [
    "trim", "tojson", "upper", "length", "list", "first", "last", "join(',')", "default('x')", "replace('a', 'b' * 99)",
    "string", "int", "items", "map(attribute='content')", "selectattr('role', 'equalto', 'user')", "reverse", "sort",
    "format(1)", "batch(2)", "center(10**8)", "wordwrap(1)", "indent(10**6)", "xmlattr", "pprint", "unique", "no_such",
    "tojson(indent=4)", "slice(3)", "sum", "round", "urlize", "safe", "dictsort", "groupby('role')", "random",
]  # fmt: skip
BINARY = ["+", "-", "*", "**", "/", "//", "%", "~", "==", "<", "in", "and", "or", "is not"]


def _expressions() -> st.SearchStrategy[str]:
    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return (
            st.builds("({} {} {})".format, inner, st.sampled_from(BINARY), inner)
            | st.builds("{} | {}".format, inner, st.sampled_from(FILTERS))
            | st.builds("{}[{}]".format, inner, inner)
            | st.builds("{}({})".format, inner, inner)
            | st.builds("({} if {} else {})".format, inner, inner, inner)
        )

    return st.recursive(st.sampled_from(ATOMS), larger, max_leaves=4)


EXPRESSIONS = _expressions()


def _larger_template(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return (
        st.builds("{}{}".format, inner, inner)
        | st.builds("{{% for m in {} %}}{}{{% endfor %}}".format, EXPRESSIONS, inner)
        | st.builds("{{% for m in messages %}}{}{{% endfor %}}".format, inner)
        | st.builds("{{% for x in y recursive %}}{{{{ loop({}) }}}}{}{{% endfor %}}".format, EXPRESSIONS, inner)
        | st.builds("{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format, EXPRESSIONS, inner, inner)
        | st.builds("{{% macro x(m) %}}{}{{% endmacro %}}{}{{{{ x({}) }}}}".format, inner, inner, EXPRESSIONS)
        | st.builds("{{% call x({}) %}}{}{{% endcall %}}".format, EXPRESSIONS, inner)
        | st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, st.sampled_from(FILTERS), inner)
        | st.builds("{{% generation %}}{}{{% endgeneration %}}".format, inner)
    )


TEMPLATES = st.recursive(
    st.builds("{{{{ {} }}}}".format, EXPRESSIONS)
    | st.builds("{{% set x = {} %}}".format, EXPRESSIONS)
    | st.builds("{{% set ns.found = {} %}}".format, EXPRESSIONS)
    | st.sampled_from(
        ["<|user|>", "<think>", "\n", "{%", "{{ }}", "{% endfor %}", "{# x", "{% break %}", "{% include 'a' %}",
         "{% import '/etc/passwd' as x %}", "{% extends 'a' %}", "{% block a %}{% endblock %}", "{% raw %}", "[INST]",
         TEMPLATE]
    ),
    _larger_template,
    max_leaves=6,
)  # fmt: skip


@contextmanager
def hosted(folder: Path, cache: Path, variant: str) -> Iterator[tuple[ModelHost, Settings]]:
    """One variant of a folder, running in this process."""
    settings = Settings(
        model=str(folder), cache_dir=cache, device="cpu", dtype="float32", variants=(variant,), max_num_requests=4
    )
    host = open_host(settings)
    try:
        yield host, settings
    finally:
        host.stop()


CHAT = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello, naïve fox 1234!"}]}
LATER = {"messages": [*CHAT["messages"], {"role": "assistant", "content": "I"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
LIMIT = {"max_tokens": 3}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT | LIMIT),
    ("/v1/chat/completions", LATER | LIMIT | {"logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", CHAT | LIMIT | {"tools": [TOOL]}),
    ("/v1/completions", {"prompt": "the quick 😀", "echo": True, "logprobs": 1} | LIMIT),
    ("/generate", {"prompt": "日本語 <|end|>", "ignore_eos": True, "stop": ["q"]} | LIMIT),
]


def answers(host: ModelHost, settings: Settings, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[int, Json]]:
    """Status and body of each answer, of the real app over a host."""

    async def go() -> list[tuple[int, Json]]:
        async with client_of(app_over(host, settings, host.tokenizer)) as client:
            found = [await client.post(path, json=body) for path, body in asked]
        return [(answer.status_code, answer.json()) for answer in found]

    return asyncio.run(go())


def refused_or_served(
    folder: Path, cache: Path, variant: str, asked: Sequence[tuple[str, dict[str, Any]]] = tuple(ASKED)
) -> str:
    """Load a folder. Returns the line that refuses it; or, if it is served, asks it something and returns ""."""
    try:
        with hosted(folder, cache, variant) as (host, settings):
            refused = host.self_check()
            if refused:
                return f"{folder}: {refused[variant]}"
            for (path, body), (status, answer) in zip(asked, answers(host, settings, asked), strict=True):
                assert status == 200 or 400 <= status < 500, (path, body, status, answer)
            assert not host.variants[variant].engine.failed.done()
            return ""
    except (StartupError, QuantError) as error:
        line = str(error)
    assert "\n" not in line, line
    assert len(line) < 2000, line
    # A tokenizer that was converted is named by its place in the cache.
    assert str(folder) in line or str(cache) in line, f"the line does not name the folder: {line}"
    return line


class Watch:
    """What this process opens while it is watched. An audit hook stays for good, so there is one, made at import."""

    def __init__(self) -> None:
        self.opened: list[str] | None = None
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if self.opened is not None and event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            self.opened.append(os.fsdecode(args[0]))


watch = Watch()


@contextmanager
def reads_within(*folders: Path) -> Iterator[None]:
    """Assert that no file is opened but of these folders, of Python and the libraries, and of the kernel."""
    own = [
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path(__file__).parents[2],
        Path("/proc"),
        Path("/sys"),
        Path("/dev"),
    ]
    watch.opened = []
    try:
        yield
    finally:
        opened, watch.opened = watch.opened, None
    allowed = [str(path.resolve()) for path in (*own, *folders)]
    outside = [path for path in opened if not os.path.abspath(path).startswith(tuple(allowed))]
    assert not outside, outside


Change = Callable[[Draw, Path], None]


def change_config(draw: Draw, folder: Path) -> None:
    """Change config.json."""
    change_json(draw, folder, "config.json")


def change_tokenizer(draw: Draw, folder: Path) -> None:
    """Change tokenizer.json."""
    change_json(draw, folder, "tokenizer.json")


OTHERS = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.json")


def change_other(draw: Draw, folder: Path) -> None:
    """Change what is read beside the tokenizer; a template of its own file would come first."""
    (folder / "chat_template.jinja").unlink()
    change_json(draw, folder, draw(st.sampled_from(OTHERS)))


def break_any(draw: Draw, folder: Path) -> None:
    """Break a file."""
    break_file(draw, folder, draw(st.sampled_from([*JSON_FILES, "model.safetensors", "chat_template.jinja"])))


def change_template(draw: Draw, folder: Path) -> None:
    """Another chat template."""
    path = folder / "chat_template.jinja"
    path.unlink()
    path.write_text(draw(TEMPLATES))


def make_older(draw: Draw, folder: Path) -> None:
    """Replace tokenizer.json by the files that it is converted from, and change or break one of them."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"])
    )
    kind = draw(st.sampled_from(["GPT2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer", "NoSuchTokenizer", None, 1]))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": kind}
    path.unlink()
    path.write_text(json.dumps(config))
    file = draw(
        st.sampled_from(["vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.model", "config.json"])
    )
    if file.endswith("g.json") and draw(st.booleans()):
        change_json(draw, folder, file)
    elif draw(st.integers(0, 3)):
        break_file(draw, folder, file)


KINDS: dict[str, Change] = {
    "config": change_config,
    "tokenizer": change_tokenizer,
    "older tokenizer": make_older,
    "other files": change_other,
    "broken files": break_any,
    "tensors": change_tensors,
    "header": change_header,
    "shards": shard,
    "template": change_template,
}
"""What is changed in a folder -> how."""


def copied(source: Path, out: Path) -> Path:
    """A copy of a folder, whose files may be replaced but not written to."""
    return Path(shutil.copytree(source, out, copy_function=os.link))
