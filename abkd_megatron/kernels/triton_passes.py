"""Triton kernels: one program per row for the records, one per tile of a row for the gradient.

Columns are processed in tiles of [LANES, EACH]; a thread holds the EACH neighboring columns of a lane, so a sum over
them costs no communication. Per lane, sums are fp64. They are added over the lanes once per row.

Numbers that vary between launches (rows, columns, strides of per-row numbers, coefficients) are not specialized on.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code=assignment
# ruff: noqa: RUF005 (Triton does not parse a starred tuple)

from abkd_megatron.kernels.triton_math import (  # type: ignore[attr-defined]  # tl is absent where Triton is
    alpha_beta_shifted,
    alpha_beta_sums,
    exp2,
    jit,
    tl,
    value_and_slope,
    weigh,
)


@jit
def _load(logits, first, columns, num_columns, other, TILE: tl.constexpr):
    """Return a row's tile in fp32, with `other` beyond its end."""
    # The same for all threads. A mask would prevent wide loads where the row's length is not a multiple of 16.
    if first + TILE <= num_columns:
        tile = tl.load(logits + first + columns)
    else:
        tile = tl.load(logits + first + columns, mask=first + columns < num_columns, other=other)
    return tile.to(tl.float32)


@jit
def _row(rows, number):
    """Return the row of a tensor that the `number`th row of a launch is; 64-bit, as a tensor may exceed 2^31 logits."""
    number = number.to(tl.int64)
    return number if rows is None else tl.load(rows + number)


@jit
def _zeros(NUM: tl.constexpr, LANES: tl.constexpr):
    """Return NUM sums per lane, 0."""
    sums = ()
    for _ in tl.static_range(NUM):
        sums = sums + (tl.zeros([LANES], tl.float64),)
    return sums


@jit
def _terms(s, t, q_base, p_base, inverse_temperature, numbers, KINDS: tl.constexpr, HAS_LABELS: tl.constexpr,
           AT_T: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Return the terms of a record's additive fields.

    Those of q and p, of the divergence, with labels of the metrics, and then at T != 1 of q and p at T = 1.
    """
    y = s - q_base
    x = t - p_base
    log_ratio = x - y
    y_at_1, x_at_1, log_ratio_at_1 = y, x, log_ratio
    if AT_T:
        y = y * inverse_temperature
        x = x * inverse_temperature
        log_ratio = log_ratio * inverse_temperature
    log_q = y * 1.4426950408889634
    log_p = x * 1.4426950408889634
    q = tl.exp2(log_q)
    p = tl.exp2(log_p)
    outside = (y == -float("inf")) & (x == -float("inf"))
    terms = (q, p)
    for part in tl.static_range(len(KINDS)):
        of_part = alpha_beta_sums(log_p, log_q, log_ratio, numbers[part], tl.constexpr(KINDS[part]), EXACT)
        for i in tl.static_range(3):
            terms = terms + (tl.where(outside, 0.0, of_part[i]) if EXACT else of_part[i],)
    if HAS_LABELS:
        q_at_1, p_at_1 = q, p
        if AT_T:
            q_at_1 = tl.exp2(y_at_1 * 1.4426950408889634)
            p_at_1 = tl.exp2(x_at_1 * 1.4426950408889634)
        terms = terms + (
            weigh(p_at_1, log_ratio_at_1, EXACT),
            weigh(p_at_1, x_at_1, EXACT),
            weigh(q_at_1, y_at_1, EXACT),
        )
        if AT_T:
            terms = terms + (q_at_1, p_at_1)
    return terms


@jit
def _add(sums, terms, NUM: tl.constexpr):
    """Add the terms of a tile, [LANES, EACH] each, to the sums per lane."""
    added = ()
    for i in tl.static_range(NUM):
        added = added + (sums[i] + tl.sum(terms[i], axis=1).to(tl.float64),)
    return added


@jit
def _shifted(sums, q_shift, p_shift, inverse_temperature, numbers, KINDS: tl.constexpr, HAS_LABELS: tl.constexpr,
             AT_T: tl.constexpr):  # fmt: skip
    """Return finite sums relative to other bases, to which the shifts are from the former; fp64 scalars."""
    PARTS: tl.constexpr = len(KINDS)
    q_factor = exp2(q_shift * 1.4426950408889634)
    p_factor = exp2(p_shift * 1.4426950408889634)
    q_at_t, p_at_t, log_q, log_p = q_factor, p_factor, q_shift, p_shift
    if AT_T:
        log_q = q_shift * inverse_temperature
        log_p = p_shift * inverse_temperature
        q_at_t = exp2(log_q * 1.4426950408889634)
        p_at_t = exp2(log_p * 1.4426950408889634)
    log_ratio = log_p - log_q
    log_q = log_q * 1.4426950408889634
    log_p = log_p * 1.4426950408889634
    shifted = (sums[0] * q_at_t, sums[1] * p_at_t)
    for part in tl.static_range(PARTS):
        shifted = shifted + alpha_beta_shifted(
            sums[2 + 3 * part], sums[3 + 3 * part], sums[4 + 3 * part], log_p, log_q, log_ratio, numbers[part],
            tl.constexpr(KINDS[part]),
        )  # fmt: skip
    if HAS_LABELS:
        LAST: tl.constexpr = 2 + 3 * PARTS
        q, p = sums[LAST + 3 if AT_T else 0], sums[LAST + 4 if AT_T else 1]
        shifted = shifted + (
            p_factor * (sums[LAST] + p * (p_shift - q_shift)),
            p_factor * (sums[LAST + 1] + p * p_shift),
            q_factor * (sums[LAST + 2] + q * q_shift),
        )
        if AT_T:
            shifted = shifted + (q * q_factor, p * p_factor)
    return shifted


@jit
def _over_lanes(sums, NUM: tl.constexpr):
    """Return the sums over the lanes."""
    whole = ()
    for i in tl.static_range(NUM):
        whole = whole + (tl.sum(sums[i], axis=0),)
    return whole


@jit
def _top(logits, maximum, lane_maximum, lane_first, num_columns, TILE: tl.constexpr):
    """Return the lowest column of the maximum, given each lane's maximum and the tile where it first was."""
    nothing = 2147483647
    first = tl.min(tl.where(lane_maximum == maximum, lane_first, nothing), axis=0)
    first = tl.where(first == nothing, 0, first)
    columns = first + tl.arange(0, TILE)
    tile = tl.load(logits + columns, mask=columns < num_columns, other=-float("inf")).to(tl.float32)
    return tl.min(tl.where(tile == maximum, columns, nothing), axis=0)


@jit
def _store(record, row, num_rows, student, teacher, label_at, num_columns, first_column, q_max, p_max, q_top, p_top,
           sums, PARTS: tl.constexpr, HAS_LABELS: tl.constexpr, AT_T: tl.constexpr,
           OF_MODEL: tl.constexpr):  # fmt: skip
    """Write the row's fields, in the order of `Layout`."""
    stride = tl.cast(num_rows, tl.int64)
    of_student = record + row
    of_teacher = of_student + OF_MODEL * stride
    tl.store(of_student, q_max.to(tl.float64))
    tl.store(of_teacher, p_max.to(tl.float64))
    tl.store(of_student + stride, sums[0])
    tl.store(of_teacher + stride, sums[1])
    field = of_teacher + OF_MODEL * stride
    for i in tl.static_range(3 * PARTS):
        tl.store(field + i * stride, sums[2 + i])
    if HAS_LABELS:
        LAST: tl.constexpr = 2 + 3 * PARTS
        for i in tl.static_range(3):
            tl.store(field + (3 * PARTS + i) * stride, sums[LAST + i])
        label = tl.load(label_at) - first_column
        held = (label >= 0) & (label < num_columns)
        nothing = -float("inf")
        tl.store(of_student + 2 * stride, tl.load(student + label, mask=held, other=nothing).to(tl.float64))
        tl.store(of_teacher + 2 * stride, tl.load(teacher + label, mask=held, other=nothing).to(tl.float64))
        tl.store(of_student + 3 * stride, (q_top + first_column).to(tl.float64))
        tl.store(of_teacher + 3 * stride, (p_top + first_column).to(tl.float64))
        if AT_T:
            tl.store(of_student + 4 * stride, sums[LAST + 3])
            tl.store(of_teacher + 4 * stride, sums[LAST + 4])


@jit
def _exact_row(student, teacher, num_columns, inverse_temperature, numbers, KINDS: tl.constexpr,
               HAS_LABELS: tl.constexpr, AT_T: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr):  # fmt: skip
    """Return a row's maxima, their columns and the sums, reading it twice: both maxima, then the sums."""
    TILE: tl.constexpr = LANES * EACH
    NUM: tl.constexpr = 2 + 3 * len(KINDS) + (3 + 2 * AT_T) * HAS_LABELS
    columns = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    q_lane = tl.full([LANES], -float("inf"), tl.float32)
    p_lane = tl.full([LANES], -float("inf"), tl.float32)
    q_first = tl.zeros([LANES], tl.int32)
    p_first = tl.zeros([LANES], tl.int32)
    for first in range(0, num_columns, TILE):
        q_tile = tl.max(_load(student, first, columns, num_columns, -float("inf"), TILE), axis=1)
        p_tile = tl.max(_load(teacher, first, columns, num_columns, -float("inf"), TILE), axis=1)
        if HAS_LABELS:
            q_first = tl.where(q_tile > q_lane, first, q_first)
            p_first = tl.where(p_tile > p_lane, first, p_first)
        q_lane = tl.maximum(q_lane, q_tile)
        p_lane = tl.maximum(p_lane, p_tile)
    q_max = tl.max(q_lane, axis=0)
    p_max = tl.max(p_lane, axis=0)
    # Where every logit is -inf, any finite base will do.
    q_base = tl.where(q_max == -float("inf"), 0.0, q_max)
    p_base = tl.where(p_max == -float("inf"), 0.0, p_max)
    sums = _zeros(NUM, LANES)
    for first in range(0, num_columns, TILE):
        s = _load(student, first, columns, num_columns, -float("inf"), TILE)
        t = _load(teacher, first, columns, num_columns, -float("inf"), TILE)
        terms = _terms(s, t, q_base, p_base, inverse_temperature, numbers, KINDS, HAS_LABELS, AT_T, True)
        sums = _add(sums, terms, NUM)
    whole = _over_lanes(sums, NUM)
    q_top, p_top = 0, 0
    if HAS_LABELS:
        q_top = _top(student, q_max, q_lane, q_first, num_columns, TILE)
        p_top = _top(teacher, p_max, p_lane, p_first, num_columns, TILE)
    # tl.max ignores NaN, eager's maximum does not. The sum is NaN only if a logit is NaN or the maximum is inf.
    q_max = tl.where((whole[0] != whole[0]) & (q_max != float("inf")), float("nan"), q_max)
    p_max = tl.where((whole[1] != whole[1]) & (p_max != float("inf")), float("nan"), p_max)
    return q_max, p_max, q_top, p_top, whole


@jit(do_not_specialize=[
    "record", "labels", "rows", "teacher_rows", "labels_stride", "num_rows", "num_columns", "first_column",
    "inverse_temperature",
])  # fmt: skip
def record_kernel(
    record,
    student,
    teacher,
    labels,
    rows,
    teacher_rows,
    student_stride,
    teacher_stride,
    labels_stride,
    num_rows,
    num_columns,
    first_column,
    inverse_temperature,
    numbers,
    KINDS: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    AT_T: tl.constexpr,
    OF_MODEL: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    """Compute the record of one row, reading it once; for alpha, beta >= 0 and alpha + beta > 0.

    The sums are relative to a base: the first tile's maximum, later the largest logit so far wherever a tile exceeds
    the base by more than 4. The maxima and their columns are exact.

    With a logit that is not finite, a sum is not finite either. The row is then redone: here if there are no partial
    sums, which takes few registers, and else by a launch of `exact_record_kernel`.
    """
    TILE: tl.constexpr = LANES * EACH
    PARTS: tl.constexpr = len(KINDS)
    NUM: tl.constexpr = 2 + 3 * PARTS + (3 + 2 * AT_T) * HAS_LABELS
    row = tl.program_id(0).to(tl.int64)
    at = _row(rows, row)
    student += at * student_stride
    teacher += _row(teacher_rows, row) * teacher_stride
    columns = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    sums = _zeros(NUM, LANES)
    q_lane = tl.full([LANES], -float("inf"), tl.float32)
    p_lane = tl.full([LANES], -float("inf"), tl.float32)
    q_first = tl.zeros([LANES], tl.int32)
    p_first = tl.zeros([LANES], tl.int32)
    # Beyond the row's end, finite, so that differences are 0 and not NaN.
    q_base = tl.max(tl.max(_load(student, 0, columns, num_columns, -1e30, TILE), axis=1), axis=0)
    p_base = tl.max(tl.max(_load(teacher, 0, columns, num_columns, -1e30, TILE), axis=1), axis=0)
    for first in range(0, num_columns, TILE):
        s = _load(student, first, columns, num_columns, -1e30, TILE)
        t = _load(teacher, first, columns, num_columns, -1e30, TILE)
        q_tile = tl.max(s, axis=1)
        p_tile = tl.max(t, axis=1)
        if HAS_LABELS:
            q_first = tl.where(q_tile > q_lane, first, q_first)
            p_first = tl.where(p_tile > p_lane, first, p_first)
        q_lane = tl.maximum(q_lane, q_tile)
        p_lane = tl.maximum(p_lane, p_tile)
        if tl.max(tl.maximum(q_tile - q_base, p_tile - p_base), axis=0) > 4.0:
            q_new = tl.max(q_lane, axis=0)
            p_new = tl.max(p_lane, axis=0)
            q_shift = q_base.to(tl.float64) - q_new
            p_shift = p_base.to(tl.float64) - p_new
            sums = _shifted(sums, q_shift, p_shift, inverse_temperature, numbers, KINDS, HAS_LABELS, AT_T)
            q_base = q_new
            p_base = p_new
        terms = _terms(s, t, q_base, p_base, inverse_temperature, numbers, KINDS, HAS_LABELS, AT_T, False)
        sums = _add(sums, terms, NUM)
    q_max = tl.max(q_lane, axis=0)
    p_max = tl.max(p_lane, axis=0)
    q_top, p_top = 0, 0
    if HAS_LABELS:
        q_top = _top(student, q_max, q_lane, q_first, num_columns, TILE)
        p_top = _top(teacher, p_max, p_lane, p_first, num_columns, TILE)
    q_shift = q_base.to(tl.float64) - q_max
    p_shift = p_base.to(tl.float64) - p_max
    whole = _shifted(_over_lanes(sums, NUM), q_shift, p_shift, inverse_temperature, numbers, KINDS, HAS_LABELS, AT_T)
    if PARTS == 0:
        total = whole[0] + whole[1]
        for i in tl.static_range(2, NUM):
            total += whole[i] - whole[i]
        if total - total != 0.0:
            q_max, p_max, q_top, p_top, whole = _exact_row(
                student, teacher, num_columns, inverse_temperature, numbers, KINDS, HAS_LABELS, AT_T, LANES, EACH
            )
    _store(
        record, row, num_rows, student, teacher, labels + at * labels_stride if HAS_LABELS else None, num_columns,
        first_column, q_max, p_max, q_top, p_top, whole, PARTS, HAS_LABELS, AT_T, OF_MODEL,
    )  # fmt: skip


@jit
def _is_finite(record, row, num_rows, FIELDS: tl.constexpr, OF_MODEL: tl.constexpr):
    """Return whether the sums of a row's record are finite."""
    stride = tl.cast(num_rows, tl.int64)
    total = tl.load(record + row + stride) + tl.load(record + row + (OF_MODEL + 1) * stride)
    for i in tl.static_range(2 * OF_MODEL, FIELDS):
        field = tl.load(record + row + i * stride)
        total += field - field
    return total - total == 0.0


@jit(do_not_specialize=[
    "record", "labels", "rows", "teacher_rows", "labels_stride", "num_rows", "num_columns", "first_column",
    "inverse_temperature",
])  # fmt: skip
def exact_record_kernel(
    record,
    student,
    teacher,
    labels,
    rows,
    teacher_rows,
    student_stride,
    teacher_stride,
    labels_stride,
    num_rows,
    num_columns,
    first_column,
    inverse_temperature,
    numbers,
    KINDS: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    AT_T: tl.constexpr,
    OF_MODEL: tl.constexpr,
    REDO: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    """Compute the record of one row, reading it twice: both maxima, then the sums relative to them.

    For any logits and coefficients. With REDO only if the sums in `record` are not finite.
    """
    PARTS: tl.constexpr = len(KINDS)
    row = tl.program_id(0).to(tl.int64)
    if REDO:  # noqa: SIM102 (compiled in)
        if _is_finite(record, row, num_rows, 2 * OF_MODEL + 3 * PARTS + 3 * HAS_LABELS, OF_MODEL):
            return
    at = _row(rows, row)
    student += at * student_stride
    teacher += _row(teacher_rows, row) * teacher_stride
    q_max, p_max, q_top, p_top, whole = _exact_row(
        student, teacher, num_columns, inverse_temperature, numbers, KINDS, HAS_LABELS, AT_T, LANES, EACH
    )
    _store(
        record, row, num_rows, student, teacher, labels + at * labels_stride if HAS_LABELS else None, num_columns,
        first_column, q_max, p_max, q_top, p_top, whole, PARTS, HAS_LABELS, AT_T, OF_MODEL,
    )  # fmt: skip


@jit
def _view(y, x, q_log_z, p_log_z, inverse_temperature, AT_T: tl.constexpr):
    """Return log p and log q to base 2 and the natural log-ratio, given logits relative to maxima and fp64 log_z."""
    log_ratio = x - y
    scale = 1.4426950408889634
    if AT_T:
        log_ratio = log_ratio * inverse_temperature
        scale = inverse_temperature * scale
    # The difference of the two in fp64: it is all that is left of the log-ratio of similar models.
    log_ratio -= (p_log_z - q_log_z).to(tl.float32)
    log_q = y * scale - (q_log_z * 1.4426950408889634).to(tl.float32)
    log_p = x * scale - (p_log_z * 1.4426950408889634).to(tl.float32)
    return log_p, log_q, log_ratio


@jit
def _weighted(log_p, log_q, log_ratio, p, q, factor, numbers, KINDS: tl.constexpr, EXACT: tl.constexpr):
    """Return value and grad_log_q of all parts, each times its weight and `factor`."""
    value, slope = value_and_slope(log_p, log_q, log_ratio, p, q, numbers[0], tl.constexpr(KINDS[0]), EXACT)
    value = value * (factor * numbers[0][0])
    slope = slope * (factor * numbers[0][0])
    for part in tl.static_range(1, len(KINDS)):
        of_part = value_and_slope(log_p, log_q, log_ratio, p, q, numbers[part], tl.constexpr(KINDS[part]), EXACT)
        value += of_part[0] * (factor * numbers[part][0])
        slope += of_part[1] * (factor * numbers[part][0])
    return value, slope


@jit(do_not_specialize=[
    "values", "slopes", "scalars", "rows", "teacher_rows", "scalar_stride", "scalar_row_stride", "num_columns",
    "inverse_temperature",
])  # fmt: skip
def second_record_kernel(
    values,
    slopes,
    student,
    teacher,
    scalars,
    rows,
    teacher_rows,
    student_stride,
    teacher_stride,
    scalar_stride,
    scalar_row_stride,
    num_columns,
    inverse_temperature,
    numbers,
    KINDS: tl.constexpr,
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
    AT_T: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    """Sum the divergence's value and grad_log_q over one row."""
    TILE: tl.constexpr = LANES * EACH
    row = tl.program_id(0).to(tl.int64)
    student += _row(rows, row) * student_stride
    teacher += _row(teacher_rows, row) * teacher_stride
    scalars += row * scalar_row_stride
    q_max = tl.load(scalars).to(tl.float32)
    q_log_z = tl.load(scalars + scalar_stride)
    p_max = tl.load(scalars + 2 * scalar_stride).to(tl.float32)
    p_log_z = tl.load(scalars + 3 * scalar_stride)
    value_sum = tl.zeros([LANES], tl.float64)
    slope_sum = tl.zeros([LANES], tl.float64)
    columns = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    for first in range(0, num_columns, TILE):
        s = _load(student, first, columns, num_columns, -float("inf"), TILE)
        t = _load(teacher, first, columns, num_columns, -float("inf"), TILE)
        log_p, log_q, log_ratio = _view(s - q_max, t - p_max, q_log_z, p_log_z, inverse_temperature, AT_T)
        outside = (log_p == -float("inf")) & (log_q == -float("inf"))
        log_ratio = tl.where(outside, 0.0, log_ratio)
        p, q = tl.exp2(log_p), tl.exp2(log_q)
        value, slope = _weighted(log_p, log_q, log_ratio, p, q, 1.0, numbers, KINDS, True)
        if VALUE:
            value_sum += tl.sum(tl.where(outside, 0.0, value), axis=1).to(tl.float64)
        if SLOPE:
            slope_sum += tl.sum(tl.where(outside, 0.0, slope), axis=1).to(tl.float64)
    if VALUE:
        tl.store(values + row, tl.sum(value_sum, axis=0))
    if SLOPE:
        tl.store(slopes + row, tl.sum(slope_sum, axis=0))


@jit(do_not_specialize=[
    "labels", "scalars", "of_divergence", "of_cross_entropy", "rows", "teacher_rows", "labels_stride", "scalar_stride",
    "scalar_row_stride",
    "of_divergence_stride", "of_cross_entropy_stride", "num_columns", "first_column", "inverse_temperature",
])  # fmt: skip
def gradient_kernel(
    out,
    student,
    teacher,
    labels,
    scalars,
    of_divergence,
    of_cross_entropy,
    rows,
    teacher_rows,
    out_stride,
    student_stride,
    teacher_stride,
    labels_stride,
    scalar_stride,
    scalar_row_stride,
    of_divergence_stride,
    of_cross_entropy_stride,
    num_columns,
    first_column,
    inverse_temperature,
    numbers,
    KINDS: tl.constexpr,
    HAS_DIVERGENCE: tl.constexpr,
    HAS_CROSS_ENTROPY: tl.constexpr,
    AT_T: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Process one tile of one row. A full tile is read and written without a mask, for wide accesses."""
    # In the first grid dimension, because the others are limited to 65535.
    program = tl.program_id(0)
    tiles = tl.cdiv(num_columns, BLOCK)
    number = (program // tiles).to(tl.int64)
    row = _row(rows, number)
    begin = program % tiles * BLOCK
    offsets = tl.arange(0, BLOCK)
    scalars += number * scalar_row_stride
    student += row * student_stride
    teacher += _row(teacher_rows, number) * teacher_stride
    out += row * out_stride + begin
    s = _load(student, begin, offsets, num_columns, 0.0, BLOCK)
    q_max = tl.load(scalars).to(tl.float32)
    q_log_z = tl.load(scalars + scalar_stride)
    y = s - q_max
    if not EXACT:
        # Finite from here on, except for NaN: an excluded column has probability 0, and 0 * -1e30 is 0.
        y = tl.maximum(y, -1e30, propagate_nan=tl.PropagateNan.ALL)
    of_q = tl.full((), 0.0, tl.float32)
    weight = of_q
    of_label = of_q
    if HAS_CROSS_ENTROPY:
        label = tl.load(labels + row * labels_stride)
        of_label = tl.load(of_cross_entropy + row * of_cross_entropy_stride).to(tl.float32)
        of_label = tl.where(label < 0, 0.0, of_label)
    if HAS_DIVERGENCE:
        t = _load(teacher, begin, offsets, num_columns, 0.0, BLOCK)
        p_max = tl.load(scalars + 3 * scalar_stride).to(tl.float32)
        p_log_z = tl.load(scalars + 4 * scalar_stride)
        weight = tl.load(of_divergence + row * of_divergence_stride).to(tl.float32)
        if AT_T:
            weight = weight * inverse_temperature
        of_q = -weight * tl.load(scalars + 5 * scalar_stride).to(tl.float32)
        x = t - p_max
        if not EXACT:
            x = tl.maximum(x, -1e30, propagate_nan=tl.PropagateNan.ALL)
        log_p, log_q, log_ratio = _view(y, x, q_log_z, p_log_z, inverse_temperature, AT_T)
        p, q = tl.exp2(log_p), tl.exp2(log_q)
        _, slope = _weighted(log_p, log_q, log_ratio, p, q, weight, numbers, KINDS, EXACT)
        if EXACT:
            slope = tl.where((log_p == -float("inf")) & (log_q == -float("inf")), 0.0, slope)
        # Either weight may be 0 where logits are not finite.
        if HAS_CROSS_ENTROPY and not AT_T:
            both = slope + q * (of_q + of_label)
            gradient = tl.where(weight == 0.0, tl.where(of_label == 0.0, 0.0, q * of_label), both)
        else:
            gradient = tl.where(weight == 0.0, 0.0, slope + q * of_q)
    else:
        gradient = tl.zeros([BLOCK], tl.float32)
    if HAS_CROSS_ENTROPY:
        if AT_T or not HAS_DIVERGENCE:
            shift = (tl.load(scalars + 2 * scalar_stride) * 1.4426950408889634).to(tl.float32)
            q_at_1 = tl.exp2(y * 1.4426950408889634 - shift)
            gradient += tl.where(of_label == 0.0, 0.0, q_at_1 * of_label)
        at = label - first_column - begin
        if (at >= 0) & (at < BLOCK):
            gradient = tl.where(offsets == at.to(tl.int32), gradient - of_label, gradient)
    gradient = gradient.to(out.dtype.element_ty)
    if begin + BLOCK <= num_columns:
        tl.store(out + offsets, gradient)
    else:
        tl.store(out + offsets, gradient, mask=offsets < num_columns - begin)
