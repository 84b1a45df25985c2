"""The base model, which transformers loads, and its adapters, which train as PEFT's do.

One base model stays in memory; `Model.attach` lays any client's factors over it and `Model.read` takes them off again.
Outside this file the scaling alpha/r is part of B; inside the layers B is PEFT's lora_B, so that training equals PEFT's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexlora import attention, blocks, gguf, nf4
from flexlora.adapted import AdaptedLinear, Factors, FrozenLinear, Scattered, adapt, freeze
from flexlora.logits import side_by_side
from flexlora.processor import multiplies_bfloat16
from flexlora.types import SEVEN_PROJECTIONS, Adapter, FlexLoraError, LowRank, Shapes, Sparse

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGE = 256
"""Hidden size from which bfloat16 pays on a processor that multiplies it by itself (docs/log.md)."""

Scaling = Literal["alpha_over_r", "rslora"]


def scaling(alpha: float, rank: int, kind: Scaling) -> float:
    """alpha/r (LoRA, arXiv 2106.09685) or alpha/√r (rsLoRA, arXiv 2312.03732); 1 at rank 0, where nothing is scaled."""
    if rank == 0:
        return 1.0
    return alpha / (rank if kind == "alpha_over_r" else math.sqrt(rank))


def scalings(adapter: Adapter, alpha: float, kind: Scaling) -> dict[str, float]:
    """`scaling` of each module that has factors, by its own rank."""
    return {m: scaling(alpha, len(x.A), kind) for m, x in adapter.items() if isinstance(x, LowRank)}


class Model:
    """A causal language model whose target layers can carry any client's adapter."""

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        *,
        name: str,
        targets: Sequence[str] = SEVEN_PROJECTIONS,
        strict: bool = True,
    ) -> None:
        """Adapts the target layers of `network` in place. Raises FlexLoraError where it is `strict` and a target does not exist."""
        self.network = network
        self.tokenizer = tokenizer
        self.name = name
        self.packed = False
        """Whether its linear weights are in four bits."""
        network.requires_grad_(False)
        network.eval()
        layers = _target_layers(network, targets, strict)
        self._layers: dict[str, AdaptedLinear] = {m: adapt(x) for m, x in layers.items()}
        for module in network.modules():
            if type(module) is nn.Linear:
                freeze(module)
        self.shapes: Shapes = {m: (x.out_features, x.in_features) for m, x in self._layers.items()}
        """Module name, as PEFT has it -> (d_out, d_in), in network order."""
        # Models that choose the keys of each query ask for "sdpa" by name, and forget the choice under any other.
        if not any(hasattr(network.config.get_text_config(), key) for key in ("index_topk", "index_topk_blocks")):
            attention.use(network)
        blocks.use(network)
        self.shares_rows: bool = attention.can_share(network)
        """Whether examples that begin alike may stand in one row."""

    @cached_property
    def side_by_side(self) -> bool:
        """Whether several threads may pass through the network at once."""
        return side_by_side(self.network)

    @cached_property
    def halves_rows(self) -> bool:
        """Whether one row may pass in two halves at once; ask before several threads pass through the network."""
        return self.side_by_side and self.shares_rows and attention.halves_rows(self.network)

    def pack(self, device: torch.device) -> None:
        """Hold all linear weights but the output layer's in four bits, on `device`. Raises FlexLoraError where that cannot be.

        The fingerprint stays that of the weights as they were.
        """
        nf4.library()
        assert self.fingerprint
        for layer in self.packable():
            layer.pack(device)
        self.packed = True

    def packable(self) -> list[FrozenLinear]:
        output = self.network.get_output_embeddings()
        return [x for x in self.network.modules() if isinstance(x, FrozenLinear) and x is not output]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the base weights (a sample of every tensor): the same for the same model in float32 and bfloat16."""
        return _fingerprint(self.network)

    @property
    def hidden_size(self) -> int:
        return self.network.config.get_text_config().hidden_size

    @property
    def faster_in_bfloat16(self) -> bool:
        """Whether it is in float32 on a processor where its training would be faster in bfloat16: products decide that, and of a
        tiny model they are too small."""
        weight = next(self.network.parameters())
        alike = weight.dtype == torch.float32 and weight.device.type == "cpu"
        return alike and self.hidden_size >= LARGE and multiplies_bfloat16()

    @property
    def positions(self) -> int | None:
        """Tokens of a sequence at most, where positions are learned, one vector each (GPT-2, OPT); None where they are computed."""
        most = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        words = self.network.get_input_embeddings()
        tables = [x for x in self.network.modules() if isinstance(x, nn.Embedding) and x is not words]
        # Some tables have a few more rows, for padding.
        return most if most and any(0 <= x.num_embeddings - most <= 8 for x in tables) else None

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def attach(
        self,
        adapter: Adapter,
        *,
        base_delta: Mapping[str, LowRank] | None = None,
        scaling: float | Mapping[str, float] = 1.0,
        dropout: float = 0.0,
        train: tuple[str, ...] = (),
    ) -> None:
        """Lay an adapter over the base model in place of the one before; the tensors are copied, the base is untouched.

        `scaling` is the factor that the layer applies (alpha/r, by module where it is a mapping): lora_B = B / scaling.
        `base_delta` is one more low-rank term that nothing trains. `train` names the parts that get gradients.
        Raises FlexLoraError for a module that this model does not adapt or factors that do not fit it.
        """
        for module, x in [*adapter.items(), *(base_delta or {}).items()]:
            shape = x.shape if isinstance(x, Sparse) else (x.B.shape[0], x.A.shape[1])
            if self.shapes.get(module) != tuple(shape):
                raise FlexLoraError(
                    f"the adapter has {module} of shape {tuple(shape)}, the model {self.name} "
                    f"{self.shapes.get(module, 'does not adapt it')}: check --model and --lora_target_modules"
                )
        for module, layer in self._layers.items():
            x, extra = adapter.get(module), (base_delta or {}).get(module)
            layer.extra = None
            if extra is not None and len(extra.A):
                layer.extra = Factors(self._own(extra.A), self._own(extra.B))
            if x is None:
                layer.term = None
            elif isinstance(x, Sparse):
                values = self._own(x.values).requires_grad_("values" in train)
                layer.term = Scattered(values, x.index.to(self.device))
            else:
                s = scaling if isinstance(scaling, (int, float)) else scaling[module]
                A = self._own(x.A).requires_grad_("A" in train and len(x.A) > 0)
                B = self._own(x.B).div_(s).requires_grad_("B" in train and len(x.A) > 0)
                layer.term = Factors(A, B, float(s), dropout)

    def _own(self, x: Tensor) -> Tensor:
        return x.detach().to(self.device, torch.float32, copy=True)

    def read(self) -> Adapter:
        """The adapter as it is now, on the CPU, with the scaling folded into B; later training does not change it."""
        result: dict[str, LowRank | Sparse] = {}
        for module, layer in self._layers.items():
            term = layer.term
            if isinstance(term, Factors):
                B = (term.B.detach() * term.scaling).cpu()
                result[module] = LowRank(B, term.A.detach().to("cpu", copy=True))
            elif isinstance(term, Scattered):
                values, index = term.values.detach().to("cpu", copy=True), term.index.cpu()
                result[module] = Sparse(values, index, self.shapes[module])
        return result

    def detach(self) -> None:
        """Back to the bare base model."""
        for layer in self._layers.values():
            layer.term = layer.extra = None

    def factors(self) -> dict[str, Factors]:
        """The low-rank terms inside the layers, live: PEFT's lora_A and lora_B by module."""
        return {m: x.term for m, x in self._layers.items() if isinstance(x.term, Factors)}

    def trainable(self) -> list[Tensor]:
        """The tensors that get gradients, in network order, A before B."""
        parts: list[Tensor] = []
        for layer in self._layers.values():
            if isinstance(layer.term, Factors):
                parts += [layer.term.A, layer.term.B]
            elif isinstance(layer.term, Scattered):
                parts.append(layer.term.values)
        return [x for x in parts if x.requires_grad]


def _target_layers(network: nn.Module, targets: Sequence[str], strict: bool) -> dict[str, nn.Linear]:
    """Linear layers whose name is a target or ends in ".target", as PEFT matches them; never the output layer."""
    output = network.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    linear = {m: x for m, x in network.named_modules() if type(x) is nn.Linear and x is not output}
    found = {m: x for m, x in linear.items() if any(m == t or m.endswith(f".{t}") for t in targets)}
    missing = [t for t in targets if not any(m == t or m.endswith(f".{t}") for m in found)]
    if strict and (missing or not found):
        have = ", ".join(dict.fromkeys(m.rsplit(".", 1)[-1] for m in linear)) or "none"
        raise FlexLoraError(
            f"--lora_target_modules: the model has no linear layer {', '.join(missing) or '(none given)'}; it has {have}"
        )
    return found


def _fingerprint(network: nn.Module) -> str:
    """Names, shapes and 64 evenly spaced entries of every weight, rounded to bfloat16 so that precision is no difference."""
    digest = hashlib.sha256()
    for name, weight in network.named_parameters():
        flat = weight.detach().view(-1)
        sample = flat[:: max(1, len(flat) // 64)][:64].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def load_model(
    name: str,
    *,
    targets: Sequence[str] = SEVEN_PROJECTIONS,
    cache_dir: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    trust_remote_code: bool = False,
    strict: bool = True,
) -> Model:
    """Load a base model: a Hugging Face name, a local folder, a GGUF file, or "smollm2" (the packaged default).

    `precision` is float32, bfloat16, float16, nf4 (four bits, see `flexlora.nf4`), stored (as the file has it) or auto:
    bfloat16 on a GPU, float32 on the CPU. Weights are read from safetensors only. Raises FlexLoraError where the model cannot be
    had, the device cannot be used, or a target module is missing where it is `strict`; else such targets are left out.
    """
    from transformers import AutoModelForCausalLM

    place = _place(device)
    usual = torch.bfloat16 if place.type == "cuda" else torch.float32
    dtype = "auto" if precision == "stored" else DTYPES.get(precision, usual)
    with _opening(name):
        source = _source(name, cache_dir)
        tokenizer = _tokenizer(source, trust_remote_code)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
        network, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers fills them with noise
        raise FlexLoraError(
            f"--model {name}: its weights lack {len(missing)} tensors of what its config.json describes, {missing[0]} first; "
            "give a whole model"
        )
    model = Model(network, tokenizer, name=name, targets=targets, strict=strict)
    if precision == "nf4":
        model.pack(place)
    network.to(place)
    return model


def _place(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.empty(0, device=device).device
        if place.type not in ("cpu", "cuda"):
            raise RuntimeError("it is neither a processor nor a CUDA device")
        return place
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise FlexLoraError(f"device: {device!r} cannot be used here ({reason}); choose cpu, cuda or auto") from None


def load_tokenizer(name: str, *, cache_dir: Path | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of `load_model`'s model; no weights are read. Raises FlexLoraError where it cannot be had."""
    with _opening(name):
        return _tokenizer(_source(name, cache_dir), trust_remote_code)


def _tokenizer(source: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # what generation needs; training pads by itself
    return tokenizer


@contextmanager
def _opening(name: str) -> Iterator[None]:
    """Without transformers' progress bars; what it cannot read is one line."""
    try:
        with without_bars():
            yield
    except FlexLoraError:
        raise
    except Exception as error:  # whatever somebody's folder makes of transformers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FlexLoraError(
            f"--model {name}: cannot be loaded ({reason}); give a folder with config.json, safetensors and a tokenizer, "
            "a GGUF file, or smollm2"
        ) from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' own progress bars."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


def _source(name: str, cache_dir: Path | None) -> str:
    """What transformers can open: GGUF files are converted first."""
    if name == "smollm2":
        return str(gguf.converted(gguf.smollm2_file(), cache_dir))
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise FlexLoraError(f"--model {name}: there is no such file")
        return str(gguf.converted(Path(name), cache_dir))
    return name


def empty_model(
    name: str,
    *,
    targets: Sequence[str] = SEVEN_PROJECTIONS,
    cache_dir: Path | None = None,
    precision: str = "auto",
    trust_remote_code: bool = False,
) -> Model:
    """The model of `load_model` on the CPU without tokenizer, of fake tensors: they have shapes and take no memory.

    Only its config.json is read. auto: float32, which any client has. It runs inside the fake mode that its tensors belong to.
    Raises FlexLoraError where there is no config.json.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(_source(name, cache_dir), trust_remote_code=trust_remote_code)
        with FakeTensorMode():
            network = AutoModelForCausalLM.from_config(
                config,
                dtype=DTYPES[{"auto": "float32", "nf4": "bfloat16"}.get(precision, precision)],
                trust_remote_code=trust_remote_code,
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FlexLoraError(
            f"--model {name}: cannot be read ({reason}); give a folder with config.json, or smollm2"
        ) from error
    model = Model(network, None, name=name, targets=targets)
    model.packed = precision == "nf4"
    return model
