"""What runs as C++ where a compiler exists: a pass in one call, and the products of many tokens
with matrices of integers.

`step.cpp` is built on first use, in a few seconds, and kept in the user's cache folder under a name
that tells the source, the compiler and the processor. Without a compiler, or for a model that it
does not know, the engine runs the same pass through PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_size_t, c_void_p
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from codellama.engine.cache import PagedCache, Span
from codellama.model.quantize import Int4Linear, Int8Linear
from codellama.model.transformer import Block, Transformer

SOURCE = Path(__file__).with_name("step.cpp")
HEADERS = [SOURCE.with_name(f"{name}.h") for name in ("vectors", "integers", "tiles", "threads")]
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fPIC", "-pthread")
MAX_ROWS = 64  # without a matrix unit; with more tokens in a pass, PyTorch is faster
FEW_ROWS = 4  # up to here the step does without tiles too
# Weights times two more than the rows: above it all threads are faster even where others use them.
LONG_WORK = 1e9
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
INT4 = 3
_log = logging.getLogger(__name__)


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("weights", "scales")),
        *((name, c_int64) for name in ("n_out", "n_in", "kind", "group")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", c_void_p),
        ("output_norm", c_void_p),
        *((name, _Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
    ]


_SIZES = (
    *("n_layers", "width", "n_heads", "n_kv_heads", "head_width", "ff_width"),
    *("kind", "cache_kind", "n_slots", "block_tokens"),
)


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in _SIZES),
        ("eps", c_float),
        ("frequencies", c_void_p),
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("head", _Matrix),
        ("layers", POINTER(_Layer)),
        *((name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("n_rows", "n_wanted", "table_width")),
        *((name, c_void_p) for name in ("tokens", "positions", "slots", "sequences")),
        *((name, c_void_p) for name in ("table", "wanted", "logits")),
    ]


class _Pace:
    """Whether one thread or all run short passes faster, as those before them tell.

    Threads meet some thirty times a pass, and where other programs use the processors as well, that
    can take longer than the pass. Threads that slept are late: each number is tried twice in a row.
    """

    def __init__(self, trial_every: int = 200) -> None:
        self._seconds: dict[tuple[int, int], float] = {}  # of a size and a number of threads
        self._n_passes: dict[int, int] = {}
        self._trial_every = trial_every

    def choose(self, n_rows: int, n_threads: int) -> int:
        size = n_rows.bit_length()
        self._n_passes[size] = n_passes = self._n_passes.get(size, 0) + 1
        if n_passes < 8:
            return n_threads if n_passes // 2 % 2 == 0 else 1
        is_trial = n_passes % self._trial_every < 2
        of_one, of_all = (self._seconds.get((size, n), 0.0) for n in (1, n_threads))
        return 1 if (of_one <= of_all) != is_trial else n_threads

    def note(self, n_rows: int, n_threads: int, seconds: float) -> None:
        key = n_rows.bit_length(), n_threads
        before = self._seconds.get(key, seconds)
        self._seconds[key] = min(seconds, before + 0.2 * (seconds - before))


class NativeStep:
    """A model and its cache as the compiled step sees them; both must stay as they are."""

    def __init__(self, library: ctypes.CDLL, model: Transformer, cache: PagedCache) -> None:
        config = model.config
        self._step, self._vocab_size = library.codellama_step, config.vocab_size
        self._n_params, self._pace = config.n_params, _Pace()
        is_float = model.model.embed_tokens.weight.dtype == torch.float32
        self.max_rows = MAX_ROWS if is_float or not library.codellama_has_tiles() else sys.maxsize
        self._held: list[object] = []  # what the pointers lead to
        kind = _KINDS[model.model.embed_tokens.weight.dtype]
        layers = (_Layer * config.num_hidden_layers)()
        for layer, block in zip(layers, model.model.layers, strict=True):
            assert isinstance(block, Block)
            layer.input_norm = self._pointer(block.input_layernorm.weight)
            layer.output_norm = self._pointer(block.post_attention_layernorm.weight)
            for owner in (block.self_attn, block.mlp):
                for name, module in owner.named_children():
                    setattr(layer, name.removesuffix("_proj"), self._hold(module))
        pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
        frequencies = 1.0 / config.rope_theta ** (pairs / config.head_dim)
        keys, values = cache.keys, cache.values
        sizes = (
            *(config.num_hidden_layers, config.hidden_size, config.num_attention_heads),
            *(config.num_key_value_heads, config.head_dim, config.intermediate_size),
            *(kind, _KINDS[keys.dtype], keys.shape[2], cache.block_tokens),
        )
        scales = (None, None) if cache.scales is None else map(self._pointer, cache.scales)
        self._model = _Model(
            *sizes,
            config.rms_norm_eps,
            self._pointer(frequencies),
            self._pointer(model.model.embed_tokens.weight),
            self._pointer(model.model.norm.weight),
            self._hold(model.lm_head),
            layers,
            self._pointer(keys),
            self._pointer(values),
            *scales,
        )

    @staticmethod
    def of(model: Transformer, cache: PagedCache) -> NativeStep | None:
        """The compiled step of a model, where there can be one."""
        weight = model.model.embed_tokens.weight
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
            return None
        linears = [model.lm_head]
        for block in model.model.layers:
            assert isinstance(block, Block)
            linears += [*block.self_attn.children(), *block.mlp.children()]
        if not all(_is_known(module, weight.dtype) for module in linears):
            return None
        others = [p for name, p in model.named_parameters() if "norm" in name or "embed" in name]
        if not all(p.dtype == weight.dtype and p.is_contiguous() for p in others):
            return None
        if cache.keys.dtype not in _KINDS or (found := library()) is None:
            return None
        return NativeStep(found, model, cache)

    def run(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        slots: Sequence[int],
        wanted: Sequence[int],
    ) -> Tensor:
        """Logits [R, V] float32 of the wanted rows; keys and values of all are cached."""
        positions: list[int] = []
        sequences: list[int] = []
        for number, span in enumerate(spans):
            positions += range(span.begin, span.end)
            sequences += [number] * (span.end - span.begin)
        width = max(len(span.blocks) for span in spans)
        table = array("i")
        for span in spans:
            table.extend(span.blocks)
            table.extend([0] * (width - len(span.blocks)))
        logits = torch.empty(len(wanted), self._vocab_size)
        integers = [array("q", x) for x in (tokens, positions, slots, sequences)]
        integers += [table, array("q", wanted)]
        addresses = [x.buffer_info()[0] for x in integers]
        batch = _Batch(len(tokens), len(wanted), width, *addresses, logits.data_ptr())
        n_threads = torch.get_num_threads()
        if is_short := self._n_params * (2 + len(tokens)) < LONG_WORK:
            n_threads = self._pace.choose(len(tokens), n_threads)
        begin = time.perf_counter()
        self._step(byref(self._model), byref(batch), c_int(n_threads))
        if is_short:
            self._pace.note(len(tokens), n_threads, time.perf_counter() - begin)
        return logits

    def _pointer(self, tensor: Tensor) -> int:
        self._held.append(tensor)
        return tensor.data_ptr()

    def _hold(self, module: nn.Module) -> _Matrix:
        self._held.append(module)
        return _matrix(module)


def _matrix(module: nn.Module) -> _Matrix:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, Int4Linear):
        sizes = module.out_features, module.in_features, INT4, module.group
        return _Matrix(weight.data_ptr(), module.scales.data_ptr(), *sizes)
    scale = module.scale.data_ptr() if isinstance(module, Int8Linear) else None
    return _Matrix(weight.data_ptr(), scale, *weight.shape, _KINDS[weight.dtype], 0)


def gather(model: nn.Module) -> None:
    """Move all weights on the CPU into one piece of memory with large pages, where Linux has them.

    Reading them then waits less for the translation of addresses: 1.2 to 1.5 times as fast here.
    """
    held = [*model.parameters(), *model.buffers()]
    places = list(accumulate((-(-x.nbytes // 64) * 64 for x in held), initial=0))
    if not sys.platform.startswith("linux") or any(x.device.type != "cpu" for x in held):
        return
    system, room = ctypes.CDLL(None), torch.empty(places[-1], dtype=torch.uint8)
    begin = -(-room.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    n_bytes = max(0, room.data_ptr() + room.nbytes - begin)
    system.madvise(c_void_p(begin), c_size_t(n_bytes), mmap.MADV_HUGEPAGE)
    for tensor, at, end in zip(held, places, places[1:], strict=False):
        moved = room[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = moved.copy_(tensor)
        # Else what was freed may stay with the process.
        if at >> 27 != end >> 27 and hasattr(system, "malloc_trim"):
            system.malloc_trim(0)


def attach(model: Transformer, is_wanted: bool) -> None:
    """Give the matrices of integers the compiled product of many rows, or take it from them."""
    found = (
        library() if is_wanted and model.model.embed_tokens.weight.device.type == "cpu" else None
    )
    for module in model.modules():
        if isinstance(module, (Int8Linear, Int4Linear)):
            module.multiply = None if found is None else functools.partial(_multiply, found, module)


def _multiply(found: ctypes.CDLL, module: Int8Linear | Int4Linear, x: Tensor) -> Tensor | None:
    """x: [N, inputs] -> [N, outputs]; None for few rows, without tiles, or for other types."""
    is_other = isinstance(module, Int8Linear) and module.scale.dtype != x.dtype
    if is_other or x.dtype not in (torch.float32, torch.bfloat16) or len(x) <= FEW_ROWS:
        return None
    x, out = x.contiguous(), x.new_empty(len(x), module.out_features)
    sizes = c_int64(_KINDS[x.dtype]), c_void_p(x.data_ptr()), c_int64(len(x))
    matrix, n_threads = _matrix(module), c_int(torch.get_num_threads())
    is_done = found.codellama_multiply(byref(matrix), *sizes, c_void_p(out.data_ptr()), n_threads)
    return out if is_done else None


class Draw(ctypes.Structure):
    """What a token is drawn by; a number from 0 to 1 decides."""

    _fields_ = [
        *((name, c_float) for name in ("temperature", "top_p", "min_p", "number")),
        ("top_k", c_int64),
    ]


def sample(logits: Tensor, draws: Sequence[Draw]) -> Tensor | None:
    """A token for each row of logits [N, V] float32 on the CPU; None without a compiler."""
    found = library()
    if found is None or logits.device.type != "cpu" or not len(draws):
        return None
    logits, tokens = logits.contiguous(), torch.empty(len(draws), dtype=torch.long)
    addresses = c_void_p(logits.data_ptr()), (Draw * len(draws))(*draws)
    sizes = c_int64(len(draws)), c_int64(logits.shape[1])
    n_threads = c_int(torch.get_num_threads() if len(draws) > FEW_ROWS else 1)
    found.codellama_sample(*addresses, *sizes, c_void_p(tokens.data_ptr()), n_threads)
    return tokens


def _is_known(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a module is a matrix that the step can multiply by, and nothing more."""
    if type(module) is Int8Linear:
        return module.scale.dtype == dtype and module.weight.is_contiguous()
    if type(module) is Int4Linear:
        return True
    if type(module) is not nn.Linear or module.bias is not None or module._forward_hooks:
        return False
    return module.weight.dtype == dtype and module.weight.is_contiguous()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled file, built where it is missing; None, and a line in the log, where not."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or os.environ.get("CODELLAMA_NATIVE") == "0":
        _log.info("no C++ compiler: decoding runs through PyTorch, more slowly")
        return None
    try:
        path = _cached_path(compiler)
        if not path.exists():
            _build(compiler, path)
        found = ctypes.CDLL(str(path))
        found.codellama_multiply.restype = found.codellama_has_tiles.restype = ctypes.c_bool
        return found
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s cannot be built, decoding will be slower: %s", SOURCE.name, error)
        return None


def _cached_path(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    parts = (version, processor.encode(), " ".join(FLAGS).encode())
    sources = (path.read_bytes() for path in (SOURCE, *HEADERS))
    key = hashlib.sha256(b"\0".join((*sources, *parts))).hexdigest()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "codellama" / f"step-{key[:24]}.so"


def _build(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        linked = Path(folder) / "step.so"
        command = [compiler, *FLAGS, "-shared", str(SOURCE), "-o", str(linked)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        linked.replace(path)
