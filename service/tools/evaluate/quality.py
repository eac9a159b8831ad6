"""Measures each scheme for `ottava evaluate`: quantizes, loads and runs it as it would be served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from kernels import Rows
from quant.analysis.choices import Continuation, Question, compare, encode, picks, read_questions
from quant.analysis.layer_errors import LinearError, linear_errors
from quant.analysis.perplexity import LogitsOf, Quality, evaluate
from quant.checkpoint.reader import Checkpoint
from quant.convert.rotate import opener, rotation
from quant.errors import InvalidQuestions, NotFinite
from quant.scheme import KVStorage, Scheme
from service.errors import InvalidSettings, UnsupportedModel
from service.models.attention import KVCache
from service.models.config import ModelConfig, smooth_groups, stream_of
from service.models.decoder import Decoder, Layer, score
from service.models.devices import pick_device, pick_dtype
from service.models.loader import load_decoder
from service.settings import Settings
from service.store.calibration import Calibration, calibration_windows, refuse_beyond
from service.store.progress import Progress, silent
from service.store.quantized import quantize_model
from service.store.resolve import is_quantized
from service.store.sink import behind_sink, with_options
from service.store.tokenizer import text_tokenizer
from service.tools.evaluate.speed import decode_tokens_per_s

LAYER_WINDOWS = 4
"""Windows on which Linears and layers are compared; their errors differ little between windows."""


@dataclass(frozen=True, slots=True)
class Row:
    """The quality, memory and speed of one scheme.

    perplexity, kl, top1_agreement, num_tokens, *_interval: see `Quality`.   perplexity_ratio: over the float model's.
    weight_bytes: of Linears, embeddings and head.   kv_bytes_per_token: of all layers' keys and values on this device.
    tokens_per_s: see `service.tools.evaluate.speed.SPEED_OF`.
    choice_accuracy, choice_agreement: see `ChoiceQuality`, over num_questions questions; None without questions.
    linear_errors: of each Linear, the largest first.   hidden_errors: ||h - h_float|| / ||h_float|| of the hidden
    states after each layer. Both are empty if not requested, and for the baseline.
    """

    scheme: str
    perplexity: float
    perplexity_ratio: float
    kl: float
    top1_agreement: float
    num_tokens: int
    weight_bytes: int
    kv_bytes_per_token: int
    tokens_per_s: float
    perplexity_ratio_interval: tuple[float, float] | None = None
    kl_interval: tuple[float, float] | None = None
    choice_accuracy: float | None = None
    choice_agreement: float | None = None
    num_questions: int = 0
    linear_errors: tuple[LinearError, ...] = ()
    hidden_errors: tuple[float, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The row as a JSON object, without empty fields."""
        return {name: value for name, value in asdict(self).items() if value is not None and value != ()}


def load_questions(path: Path) -> list[Question]:
    """See `read_questions`.

    Raises:
        InvalidSettings: the file cannot be read or a line is malformed.
    """
    try:
        return read_questions(path)
    except InvalidQuestions as error:
        raise InvalidSettings(str(error)) from error


def measure_quality(
    folder: Path,
    schemes: Sequence[Scheme],
    windows: Tensor,
    calibration: Calibration,
    settings: Settings,
    *,
    on_progress: Progress = silent,
    questions: Sequence[Question] = (),
    has_layers: bool = False,
    stored: Path | None = None,
) -> Iterator[Row]:
    """A row for the float baseline, then one for each int8 scheme, in the order given, each as soon as it is known.

    Only the baseline and one int8 model are in memory at a time; consecutive schemes that differ only in the storage of
    keys, values and head share one.

    Args:
        folder: a float model.
        schemes: to compare; the baseline is always measured too.
        windows: [n, L] int64 token ids to measure on.
        calibration: the tokens that the schemes are calibrated on.
        questions: multiple-choice questions.
        has_layers: also measure the error of every Linear and layer, on the first LAYER_WINDOWS windows.
        stored: the int8 folder of the same model to measure as it is; schemes then only say how keys and values are
            stored (`stored_schemes`).

    Raises:
        UnsupportedModel: the model is quantized already, not of a served family, has a context shorter than a window,
            or has logits that are not finite; stored is of another vocabulary.
        InvalidSettings: a question is longer than the context.
    """
    if is_quantized(folder):
        raise UnsupportedModel(
            f"{folder} is quantized already; evaluate the float model and name schemes, or name the float model with "
            "--baseline"
        )
    # The longest context that is served, because questions may be longer than windows.
    config = ModelConfig.load(folder, max(windows.shape[1], ModelConfig.load(folder).max_model_len))
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, config, device)
    asked = _encoded(folder, questions, config.max_model_len)
    quantized = [scheme for scheme in schemes if scheme.is_int8]
    if stored is None:
        quantized = [with_options(folder, scheme, settings) for scheme in quantized]
    if stored is not None:
        _refuse_other_vocabulary(stored, config)
    # Before anything is measured, so that a text that is too short is known at once.
    read: dict[Calibration, Tensor] = {}
    for scheme in quantized:
        given = calibration.for_scheme(scheme)
        if stored is None and scheme.needs_calibration and given not in read:
            read[given] = calibration_windows(folder, given, device, on_progress)

    def load(path: Path) -> Decoder:
        return load_decoder(path, dtype, device, config.max_model_len)

    bench = _Bench(load(folder), windows, asked, [question.answer for question in questions], on_progress)
    try:
        yield bench.baseline_row()
        for group in _sharing_weights(quantized):
            with TemporaryDirectory(prefix="ottava-evaluate-") as scratch:
                out = stored or Path(scratch) / "model"
                if stored is None:
                    given = calibration.for_scheme(group[0])
                    quantize_model(
                        folder, out, group[0], given, device, on_progress=on_progress, windows=read.get(given)
                    )
                weights = load(out)
                candidates = {scheme.label: _stored(weights, scheme) for scheme in group}
                rows = bench.rows(candidates)
                if has_layers:
                    opened = Checkpoint.open(out, torch.float32, device)
                    errors = _linear_errors(folder, opened, config, group[0], windows=windows, on_progress=on_progress)
                    turn = rotation(config.hidden_size).to(device) if group[0].is_rotated else None
                    rows = bench.with_hidden_errors(rows, candidates, turn)
                    rows = [replace(row, linear_errors=errors) for row in rows]
            yield from rows
            # Otherwise two int8 models would be in memory while the next one is loaded.
            del weights, candidates
    except NotFinite as error:
        raise UnsupportedModel(f"{folder} cannot be measured: {error}") from error


def stored_schemes(folder: Path, storages: Sequence[KVStorage | None], has_layers: bool = False) -> list[Scheme]:
    """How an int8 folder is quantized, with each storage type of keys and values; None for the folder's own.

    Raises:
        CheckpointError: the folder cannot be read.
        InvalidSettings: layers are to be compared, and only the tool that wrote the folder knows how it smoothed.
    """
    checkpoint = Checkpoint.open(folder, torch.float32, "meta")
    if has_layers and not checkpoint.notes:
        raise InvalidSettings(
            f"--layers: {folder} was not written by ottava, and does not say how it was smoothed; leave --layers out"
        )
    scheme = checkpoint.schemes[0]
    if len(checkpoint.schemes) > 1:
        scheme = replace(scheme, name=checkpoint.scheme_name or scheme.name)
    return list(dict.fromkeys(scheme.with_kv(kv) for kv in storages))


def _refuse_other_vocabulary(stored: Path, config: ModelConfig) -> None:
    size = ModelConfig.load(stored).vocab_size
    if size != config.vocab_size:
        raise UnsupportedModel(
            f"{stored} has {size} token ids and the baseline {config.vocab_size}: they are not one model; name the "
            "float model that it was made of with --baseline"
        )


class _Bench:
    """The float model, and the data that every scheme is measured on."""

    def __init__(
        self,
        baseline: Decoder,
        windows: Tensor,
        questions: Sequence[Sequence[Continuation]],
        answers: Sequence[int],
        on_progress: Progress,
    ) -> None:
        self.baseline = baseline
        self.windows = windows
        self.questions = questions
        self.answers = answers
        self.on_progress = on_progress
        self._picked: list[int] = []

    def baseline_row(self) -> Row:
        (quality,) = self._evaluate({})
        self._picked = self._picks(self.baseline)
        return self._row(quality, 1.0, self.baseline, self._picked)

    def rows(self, candidates: Mapping[str, Decoder]) -> list[Row]:
        """One row per candidate. Computes the baseline's logits again: storing them takes more than a small model."""
        first, *others = self._evaluate(candidates)
        return [
            self._row(quality, quality.perplexity / first.perplexity, decoder, self._picks(decoder))
            for quality, decoder in zip(others, candidates.values(), strict=True)
        ]

    def with_hidden_errors(
        self, rows: Sequence[Row], candidates: Mapping[str, Decoder], turn: Tensor | None
    ) -> list[Row]:
        """turn: by which the candidates' residual streams are rotated, if they are."""
        return [
            replace(row, hidden_errors=_hidden_errors(self.baseline, candidates[row.scheme], self.windows, turn))
            for row in rows
        ]

    def _evaluate(self, candidates: Mapping[str, Decoder]) -> list[Quality]:
        scorers = {name: scorer(decoder) for name, decoder in candidates.items()}
        return evaluate(("fp16", scorer(self.baseline)), scorers, self.windows, self._progress("measuring"))

    def _picks(self, decoder: Decoder) -> list[int]:
        return picks(scorer(decoder), self.questions, self._progress("answering"))

    def _row(self, quality: Quality, ratio: float, decoder: Decoder, picked: list[int]) -> Row:
        choices = compare(picked, self.answers, self._picked) if picked else None
        return Row(
            scheme=quality.scheme,
            perplexity=quality.perplexity,
            perplexity_ratio=ratio,
            perplexity_ratio_interval=quality.ratio_interval,
            kl=quality.kl,
            kl_interval=quality.kl_interval,
            top1_agreement=quality.top1_agreement,
            num_tokens=quality.num_tokens,
            weight_bytes=decoder.weight_bytes,
            kv_bytes_per_token=decoder.kv_bytes_per_token,
            tokens_per_s=decode_tokens_per_s(decoder),
            choice_accuracy=choices.accuracy if choices else None,
            choice_agreement=choices.agreement if choices else None,
            num_questions=len(picked),
        )

    def _progress(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.on_progress(stage, done, total)


def _encoded(folder: Path, questions: Sequence[Question], context: int) -> list[list[Continuation]]:
    if not questions:
        return []
    tokenizer = text_tokenizer(folder)
    try:
        encoded = [encode(tokenizer, question, context) for question in questions]
    except InvalidQuestions as error:
        raise InvalidSettings(str(error)) from error
    refuse_beyond(folder, max(max(choice.ids) for choices in encoded for choice in choices))
    return encoded


def _sharing_weights(schemes: Sequence[Scheme]) -> list[list[Scheme]]:
    """Group consecutive schemes that store the same weights."""
    groups: list[list[Scheme]] = []
    for scheme in schemes:
        if groups and _stored_weights(groups[-1][0]) == _stored_weights(scheme):
            groups[-1].append(scheme)
        else:
            groups.append([scheme])
    return groups


def _stored_weights(scheme: Scheme) -> Scheme:
    """The scheme without what is decided when its weights are loaded."""
    return scheme.with_kv("float").with_head("float")


def _stored(decoder: Decoder, scheme: Scheme) -> Decoder:
    """A decoder with the same weights and the scheme's storage of keys, values and head."""
    twin = copy(decoder)
    twin.kv = scheme.kv
    if scheme.head == "int8":
        twin.quantize_head()
    return twin


def scorer(decoder: Decoder) -> LogitsOf:
    """Computes a decoder's logits of a text."""

    def logits_of(token_ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return score(decoder, token_ids)

    return logits_of


def _linear_errors(
    folder: Path, stored: Checkpoint, config: ModelConfig, scheme: Scheme, *, windows: Tensor, on_progress: Progress
) -> tuple[LinearError, ...]:
    groups = smooth_groups(config) if scheme.smoothing is not None else []
    found = linear_errors(
        folder,
        stored,
        groups,
        behind_sink(windows[:LAYER_WINDOWS], stored.sink_ids),
        lambda done, total: on_progress("comparing layers", done, total),
        open_files=opener(stream_of(config) if scheme.is_rotated else None),
    )
    return tuple(found)


@torch.inference_mode()
def _hidden_errors(baseline: Decoder, candidate: Decoder, windows: Tensor, turn: Tensor | None) -> tuple[float, ...]:
    """||h - h_float|| / ||h_float|| after each layer, averaged over tokens."""
    found = []
    for window in windows[:LAYER_WINDOWS]:
        states = _hidden_states(candidate, window)
        states = states if turn is None else [state @ turn.T for state in states]
        pairs = zip(_hidden_states(baseline, window), states, strict=True)
        # Without the states of a sink that was added.
        errors = [((h[-len(ref) :] - ref).norm(dim=-1) / ref.norm(dim=-1)).mean() for ref, h in pairs]
        found.append(torch.stack(errors))
    return tuple(torch.stack(found).mean(0).tolist())


def _hidden_states(decoder: Decoder, window: Tensor) -> list[Tensor]:
    """The residual stream after each layer, [L, hidden_size] float32."""
    twin, states = copy(decoder), list[Tensor]()
    twin.layers = [_Recorded(layer, states) for layer in decoder.layers]
    score(twin, window)
    return states


class _Recorded(Layer):
    """A layer that records the residual stream after it."""

    def __init__(self, layer: Layer, states: list[Tensor]) -> None:
        self.layer = layer
        self.states = states

    def __call__(
        self, x: Tensor, residual: Tensor | None, rows: Rows, cos_sin: Tensor, cache: KVCache
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.layer(x, residual, rows, cos_sin, cache)
        self.states.append(x.float() + residual.float())
        return x, residual
