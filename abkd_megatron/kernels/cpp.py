"""CPU kernel in C++.

`cpp.cpp` is built by the local C++ compiler on first use, in seconds, and cached in the user's cache directory.
Arithmetic is fp32 within a tile of columns and fp64 across tiles. Rows are distributed over torch's threads; results do
not depend on their number.

Legend: n rows, C this rank's real columns.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from abkd_megatron.errors import ConfigError, HostError
from abkd_megatron.kernels import eager
from abkd_megatron.kernels.parts import weighted_parts
from abkd_megatron.kernels.record import Layout
from abkd_megatron.losses.alpha_beta import AlphaBeta
from abkd_megatron.losses.base import Divergence, coefficient
from abkd_megatron.losses.mixture import JensenShannon, SkewForwardKL, SkewReverseKL
from abkd_megatron.losses.todi import ToDi
from abkd_megatron.losses.total_variation import TotalVariation
from abkd_megatron.tensors import has_memory, is_traced

DTYPES = (torch.float32, torch.bfloat16)

_SOURCE = Path(__file__).with_name("cpp.cpp")
# No -ffinite-math-only: infinities and NaN are needed. Contraction is safe, because the difference of equal logits is
# taken before any product.
_OPTIONS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
_OPTIONS += ["-fopenmp", "-Wno-psabi", "-shared", "-fPIC"]


# In the order of `Kind` in cpp.cpp.
_KINDS = (AlphaBeta, ToDi, SkewForwardKL, SkewReverseKL, JensenShannon, TotalVariation)
MAX_PARTS = 8
"""Largest number of parts of a weighted sum."""
_FORWARD, _REVERSE = AlphaBeta(1.0, 0.0), AlphaBeta(0.0, 1.0)
_CHEAP = (_FORWARD, _REVERSE, TotalVariation())
# Below, a share of a mixture is not a normal number of fp32, or has no normal square.
_LEAST_SHARE = 2.0**-60


class _Gap(ctypes.Structure):
    _fields_ = [("size", ctypes.c_float), ("inverse", ctypes.c_float)]

    @classmethod
    def of(cls, number: float) -> "_Gap":
        size = coefficient(number, torch.float32)
        return cls(size, 1.0 / size if size else 0.0)


class _Part(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("weight", ctypes.c_float),
        *((name, _Gap) for name in ("alpha", "beta", "lam")),
        ("spread", ctypes.c_float),
        ("widest", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("scale", "share", "rest")),
        ("detach", ctypes.c_int32),
    ]


class _Settings(ctypes.Structure):
    _fields_ = [
        ("inverse_temperature", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("num_parts", ctypes.c_int32),
        ("num_others", ctypes.c_int32),
        ("forward", ctypes.c_float),
        ("reverse", ctypes.c_float),
        ("total_variation", ctypes.c_float),
        ("mirrored", ctypes.c_int32),
        ("parts", _Part * (2 * MAX_PARTS)),
    ]


class _Logits(ctypes.Structure):
    _fields_ = [("first", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("is_bf16", ctypes.c_int32)]

    @classmethod
    def of(cls, logits: Tensor) -> "_Logits":
        return cls(_checked(logits).data_ptr(), logits.stride(0), logits.dtype == torch.bfloat16)


@functools.cache
def compiler() -> list[str]:
    """Return the C++ compiler command: CXX of the environment, else c++, g++ or clang++; empty if there is none."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        return chosen
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), [])


@functools.cache
def _library() -> ctypes.CDLL:
    """Build the library for this processor, or load it from the cache.

    Raises:
        HostError: if there is no C++ compiler, or it fails.
    """
    command = [*compiler(), *_OPTIONS]
    if command == _OPTIONS:
        raise HostError(
            "the cpp kernel needs a C++ compiler, but none of c++, g++ and clang++ is on PATH: install one, set CXX, "
            "or choose the eager kernel"
        )
    processor = [platform.machine()]
    if (cpuinfo := Path("/proc/cpuinfo")).exists():  # different machines may share a home directory
        lines = cpuinfo.read_text().splitlines()
        processor += sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    key = hashlib.sha256("\n".join([*command, *processor]).encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "abkd_megatron"
    library = cache / f"kernel-{key}.so"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if library.exists():
            return ctypes.CDLL(str(library))
        folder = tempfile.TemporaryDirectory(dir=cache)
    except OSError:  # home is not writable
        folder = tempfile.TemporaryDirectory()
        library = Path(folder.name) / "loaded.so"
    with folder:
        # Each process builds its own file and renames it atomically, so ranks that start together need no lock.
        built = Path(folder.name) / "kernel.so"
        done = subprocess.run([*command, "-o", built, _SOURCE], capture_output=True, text=True)
        if done.returncode != 0:
            raise HostError(
                f"the C++ compiler could not build the cpp kernel ({shlex.join(command)}):\n{done.stderr.strip()}\n"
                "Set CXX to another compiler, or choose the eager kernel"
            )
        built.replace(library)
        return ctypes.CDLL(str(library))


def supports(divergence: Divergence) -> bool:
    """Return True for a built-in divergence, or a weighted sum of up to 8 of them, with shares of at least 2**-60."""
    parts = weighted_parts(divergence)
    shares = [share for _, part in parts if (share := _share(part)) is not None]
    return 0 < len(parts) <= MAX_PARTS and all(min(share, 1.0 - share) >= _LEAST_SHARE for share in shares)


def _share(part: Divergence) -> float | None:
    if isinstance(part, JensenShannon):
        return part.mixture
    return part.skew if isinstance(part, SkewForwardKL | SkewReverseKL) else None


def _check(student: Tensor, teacher: Tensor, divergence: Divergence) -> None:
    if not supports(divergence) or not {student.dtype, teacher.dtype} <= set(DTYPES):
        raise ConfigError(
            f"the cpp kernel supports the built-in divergences, and weighted sums of up to {MAX_PARTS} of them, on "
            f"torch.float32 or torch.bfloat16 logits, got {divergence!r} on {student.dtype} and {teacher.dtype}: "
            "choose the eager kernel"
        )
    if student.device.type != "cpu" or teacher.device.type != "cpu":
        raise HostError(
            f"the cpp kernel needs logits on a CPU, got {student.device} and {teacher.device}: choose the triton kernel"
        )
    for name, logits in (("student", student), ("teacher", teacher)):
        if logits.dim() != 2 or logits.shape != student.shape or (logits.stride(1) != 1 and logits.shape[1] > 1):
            raise ConfigError(
                f"the cpp kernel needs {name} logits [n, C] whose last dimension is contiguous, got "
                f"{list(logits.shape)} with strides {logits.stride()}, student {list(student.shape)}: choose the "
                "eager kernel"
            )


def _part(divergence: Divergence, weight: float = 1.0) -> _Part:
    part = _Part(kind=_KINDS.index(type(divergence)), weight=weight)
    if isinstance(divergence, AlphaBeta):
        part.alpha, part.beta = _Gap.of(divergence.alpha), _Gap.of(divergence.beta)
        part.lam = _Gap.of(divergence.alpha + divergence.beta)
        sizes = [abs(gap.size) for gap in (part.beta, part.lam, part.alpha)]
        part.spread = max(sizes)
        part.widest = sizes.index(part.spread)
    elif isinstance(divergence, ToDi):
        part.scale, part.detach = coefficient(divergence.scale, torch.float32), divergence.detach
    elif isinstance(divergence, SkewReverseKL):
        part.detach = divergence.detach_mixture
    if (share := _share(divergence)) is not None:
        part.share, part.rest = share, 1.0 - share
    return part


def _settings(parts: list[_Part], temperature: float) -> _Settings:
    held = (_Part * (2 * MAX_PARTS))(*parts)
    return _Settings(1.0 / temperature, torch.get_num_threads(), len(parts), len(parts), parts=held)


def _weighted(divergence: Divergence, temperature: float) -> _Settings:
    """Return the parts of a divergence, the cheap ones last."""
    parts = weighted_parts(divergence)
    cheap = [(weight, part) for weight, part in parts if part in _CHEAP]
    others = [(weight, part) for weight, part in parts if part not in _CHEAP]
    settings = _settings([_part(part, weight) for weight, part in others + cheap], temperature)
    settings.num_others = len(others)
    settings.forward, settings.reverse, settings.total_variation = (
        sum(weight for weight, part in cheap if part == kind) for kind in _CHEAP
    )
    settings.mirrored = any(
        isinstance(part, SkewForwardKL) or (isinstance(part, JensenShannon) and part.mixture > 0.5)
        for _, part in others
    )
    return settings


def _separated(divergence: Divergence, temperature: float) -> _Settings:
    """Return alpha-beta divergences, whose partial sums are the ones of `divergence`; none if it does not separate."""
    parts: list[Divergence] = []
    if divergence.num_partial_sums:
        for _, part in weighted_parts(divergence):
            parts += [part] if isinstance(part, AlphaBeta) else [_FORWARD, _REVERSE]  # ToDi
    return _settings([_part(part) for part in parts], temperature)


def _pointer(numbers: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(_checked(numbers).data_ptr() if numbers is not None else None)


def _checked(numbers: Tensor) -> Tensor:
    """Return the tensor after checking that C++ may access its memory."""
    if numbers.device.type != "cpu" or not has_memory(numbers) or is_traced():
        raise HostError(
            f"the cpp kernel needs tensors with CPU memory, got a {type(numbers).__name__} on {numbers.device} "
            "without memory, or under tracing (FakeTensorMode, make_fx): choose the eager kernel"
        )
    return numbers


def _sized(numbers: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Return `numbers`, contiguous, in that dtype.

    Raises:
        ConfigError: for another shape, which C++ would read out of bounds.
    """
    if numbers is None:
        return None
    if numbers.shape != shape:
        raise ConfigError(f"the cpp kernel expected {list(shape)} numbers, got {list(numbers.shape)}: one for each row")
    return numbers.to(dtype).contiguous().resolve_neg()


def local_record(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    first_column: int,
    divergence: Divergence,
    layout: Layout,
    dtype: torch.dtype,
) -> Tensor:
    """Compute `eager.local_record` for all rows at once; any row stride.

    Raises:
        ConfigError: for a divergence that `supports` excludes, or logits other than fp32 and bf16.
        HostError: for tensors without CPU memory, or if the kernel cannot be built.
    """
    _check(student, teacher, divergence)
    num_rows, num_columns = student.shape
    if num_rows == 0 or num_columns == 0:
        return eager.local_record(student, teacher, labels, first_column, divergence, layout, dtype)
    labels = _sized(labels, (num_rows,), torch.int64)
    record = torch.empty(layout.size, num_rows, dtype=torch.float64, device="cpu")
    settings = _separated(divergence, layout.temperature)
    _library().abkd_record(
        _pointer(record),
        _Logits.of(student),
        _Logits.of(teacher),
        _pointer(labels),
        *(ctypes.c_int64(number) for number in (num_rows, num_columns, first_column)),
        ctypes.byref(settings),
    )
    return record


def local_second_record(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    temperature: float,
    dtype: torch.dtype,
    scalars: Tensor,
    value: bool,
    grad_log_q: bool,
) -> Tensor:
    """Compute `eager.local_second_record` for all rows at once; any row stride.

    Raises:
        ConfigError: as `local_record`.
        HostError: as `local_record`.
    """
    _check(student, teacher, divergence)
    num_rows, num_columns = student.shape
    record = torch.zeros(value + grad_log_q, num_rows, dtype=torch.float64, device="cpu")
    if num_rows == 0 or num_columns == 0:
        return record
    settings = _weighted(divergence, temperature)
    _library().abkd_second_record(
        _pointer(record[0] if value else None),
        _pointer(record[-1] if grad_log_q else None),
        _Logits.of(student),
        _Logits.of(teacher),
        *(ctypes.c_int64(number) for number in (num_rows, num_columns)),
        _pointer(_sized(scalars, (4, num_rows), torch.float64)),
        ctypes.byref(settings),
    )
    return record


def local_gradient(
    out: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    first_column: int,
    divergence: Divergence,
    temperature: float,
    dtype: torch.dtype,
    scalars: Tensor,
    of_divergence: Tensor | None,
    of_cross_entropy: Tensor | None,
) -> None:
    """Compute `eager.local_gradient` for all rows at once; any row stride, and `out` may be the student.

    Raises:
        ConfigError: as `local_record`.
        HostError: as `local_record`.
    """
    _check(student, teacher, divergence)
    num_rows, num_columns = student.shape
    if num_rows == 0 or num_columns == 0:
        return
    settings = _weighted(divergence, temperature)
    if out.shape != student.shape or out.dtype != student.dtype or (out.stride(1) != 1 and num_columns > 1):
        raise ConfigError(
            f"the cpp kernel needs an output of {list(student.shape)} {student.dtype} with a contiguous last "
            f"dimension, got {list(out.shape)} {out.dtype} with strides {out.stride()}: choose the eager kernel"
        )
    of_rows = (num_rows,)
    held = [
        _sized(labels, of_rows, torch.int64),
        _sized(scalars, (6, num_rows), torch.float64),
        _sized(of_divergence, of_rows, torch.float32),
        _sized(of_cross_entropy if labels is not None else None, of_rows, torch.float32),
    ]
    _library().abkd_gradient(
        _pointer(out),
        ctypes.c_int64(out.stride(0)),
        _Logits.of(student),
        _Logits.of(teacher),
        _pointer(held[0]),
        *(ctypes.c_int64(number) for number in (num_rows, num_columns, first_column)),
        *(_pointer(numbers) for numbers in held[1:]),
        ctypes.byref(settings),
    )


def rest_record(
    record: Tensor,
    of_kept: Tensor,
    student: Tensor,
    labels: Tensor,
    kept: Tensor,
    first_column: int,
    temperature: float,
) -> None:
    """Compute the record of the rest of a student's columns, and copy the kept logits; any row stride.

    Args:
        record: [fields, n] fp64, receives the fields of a `Layout` with labels, of a student that is compared with
            itself: its own, and sum q log q at T = 1.
        of_kept: [K, n] fp64 with the row stride of `record`, receives the kept logits; 0 for those of other ranks.
        student: [n, C] fp32 or bf16.
        labels: [n] int64.
        kept: [n, K] int64, columns; those that are out of range are on other ranks.
        first_column: id of the first column.
        temperature: T.

    Raises:
        HostError: as `local_record`.
    """
    num_rows, num_columns = student.shape
    assert record.stride() == of_kept.stride() and record.stride(-1) == 1
    labels, kept = labels.contiguous(), kept.contiguous()
    _library().abkd_rest(
        *(_pointer(numbers) for numbers in (record, of_kept)),
        ctypes.c_int64(record.stride(0)),
        _Logits.of(student),
        *(_pointer(numbers) for numbers in (labels, kept)),
        *(ctypes.c_int64(number) for number in (kept.shape[-1], num_rows, num_columns, first_column)),
        ctypes.c_float(1.0 / temperature),
        ctypes.c_int32(torch.get_num_threads()),
    )


def write_columns(out: Tensor, at: Tensor, values: Tensor) -> None:
    """Write `values` [m, n] to those of the columns `at` [n, m] int64 that `out` [n, C], fp32 or bf16, has.

    Of several values for one column the first is written.
    """
    num_rows, num_columns = out.shape
    at, values = at.contiguous(), values.float().contiguous()
    _library().abkd_write_columns(
        _pointer(out),
        ctypes.c_int64(out.stride(0)),
        ctypes.c_int32(out.dtype == torch.bfloat16),
        *(_pointer(numbers) for numbers in (at, values)),
        *(ctypes.c_int64(number) for number in (at.shape[-1], num_rows, num_columns)),
    )
