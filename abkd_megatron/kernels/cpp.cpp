// CPU kernel for the passes over logits, in vectors of the machine's width. It uses no intrinsics, but needs the GNU
// vector extensions.
//
// Sums are fp32 per lane within a tile of columns and fp64 across tiles. A tile with no logit far below its row's
// maximum uses the short form of each divided difference. Any other tile uses the form of alpha_beta.py, in which
// nothing overflows and 0 * inf is 0.
//
// Legend: n rows; s, t logits of student and teacher; y, x the same relative to their row's constants; r = x - y.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// ---------------------------------------------------------------- arguments; the layout must match cpp.py

struct Part {
    float alpha, beta, lam, spread;
    int32_t widest;  // which of |beta|, |lam|, |alpha| is the spread
};

struct Settings {
    float inverse_temperature;
    int32_t num_parts;
    Part parts[2];
    int32_t todi;  // the gradient uses ToDi's slope instead of parts[0]'s
    float scale;
    int32_t detach, threads;
};

struct Logits {
    const void* first;
    int64_t row_stride;
    int32_t is_bf16;
};

namespace {

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int TILE = 256;
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));

constexpr float INF = std::numeric_limits<float>::infinity();
// Up to here exp and its inverse are finite and normal.
constexpr float SAFE = 80.0f;

INLINE F splat(float x) { return x - F{}; }

template <class To, class From>
INLINE To as(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits are kept");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// ---------------------------------------------------------------- loads and stores

struct bf16 {
    uint16_t bits;
};

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) { return as<float>(uint32_t(x.bits) << 16); }

INLINE F load(const float* from) {
    F x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

INLINE F load(const bf16* from) {
    H x;
    std::memcpy(&x, from, sizeof x);
#ifdef __AVX512BW__  // one permutation; a conversion takes several instructions
    typedef uint16_t Halves __attribute__((vector_size(4 * LANES)));
    const Halves above_zeros = __builtin_shufflevector(
        H{}, x, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
        14, 30, 15, 31
    );
    return as<F>(above_zeros);
#else
    return as<F>(__builtin_convertvector(x, U) << 16);
#endif
}

// Loads `count` columns, and `other` into the remaining lanes.
template <class T>
INLINE F load(const T* from, int64_t count, float other) {
    if (count >= LANES) return load(from);
    F x = splat(other);
    for (int lane = 0; lane < count; ++lane) x[lane] = to_float(from[lane]);
    return x;
}

INLINE void store(float* to, F x, int64_t count = LANES) { std::memcpy(to, &x, sizeof(float) * count); }

INLINE void store(bf16* to, F x, int64_t count = LANES) {
    U bits = as<U>(x);
    U nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
    H half = __builtin_convertvector(x == x ? nearest : (bits >> 16) | 0x40, H);
    std::memcpy(to, &half, sizeof(bf16) * count);
}

// ---------------------------------------------------------------- exponentials

struct Reduced {
    F r, above;  // x = n log 2 + r, exp(r) = 1 + r + above
    F shifted;   // n + SHIFTER
};

constexpr float SHIFTER = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits

// (exp(r) - 1 - r) / r^2 on |r| <= log(2) / 2, interpolated by a polynomial of degree 4 at the Chebyshev nodes. The
// relative error of `above` is 1.4e-7, about a unit in the last place.
INLINE Reduced reduce(F x) {
    F shifted = x * 1.44269504f + SHIFTER;
    F n = shifted - SHIFTER;
    F r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    F g = r * 0.0013926213466f + 0.0083632029716f;
    g = g * r + 0.0416665544377f;
    g = g * r + 0.1666657684599f;
    g = g * r + 0.5f;
    return {r, r * r * g, shifted};
}

INLINE F power_of_2(U exponent) { return as<F>((exponent << 23) + (127u << 23)); }

// |x| <= SAFE.
INLINE F exp_safe(F x) {
    Reduced e = reduce(x);
    F scale = power_of_2(as<U>(e.shifted));
    return (e.r + e.above) * scale + scale;
}

INLINE F exp_any(F x) {
    x = x < -110.0f ? splat(-110.0f) : x;
    x = x > 89.0f ? splat(89.0f) : x;
    Reduced e = reduce(x);
    I n = as<I>(e.shifted) - as<I>(splat(SHIFTER)), half = n >> 1;  // 2^n may be out of range
    return (e.r + e.above + 1.0f) * power_of_2(as<U>(half)) * power_of_2(as<U>(n - half));
}

struct Rise {
    F e, over, above;  // exp(g r) - 1; that / g; (exp(g r) - 1 - g r) / g. All to full precision.
};

// For gap g, the limit at 0. |g r| <= SAFE.
INLINE Rise rise(float gap, F r) {
    if (gap == 0.0f) return {splat(0.0f), r, splat(0.0f)};
    F x = r * gap;
    Reduced part = reduce(x);
    F scale = power_of_2(as<U>(part.shifted));
    F e = (part.r + part.above) * scale + (scale - 1.0f);
    float inverse = 1.0f / gap;
    return {e, e * inverse, (part.shifted == SHIFTER ? part.above : e - x) * inverse};
}

// ---------------------------------------------------------------- divergences

// mass * amount with 0 * inf = 0.
INLINE F weigh(F mass, F amount) { return mass == 0.0f ? splat(0.0f) : mass * amount; }

struct Terms {
    F mass, slope, value;
};

// F = u phi(r), as in AlphaBeta: divided differences of exp(x r) at {0, alpha, lam}, without the linear parts, which
// cancel.
INLINE F value_safe(const Part& k, F u, F r, const Rise& a) {
    if (k.spread == 0.0f) return r * r * 0.5f;
    if (k.widest == 0) return (rise(k.lam, r).above - a.above) * (u * (1.0f / k.beta));
    Rise b = rise(k.beta, r);
    F from_alpha = b.above + a.e * b.over;
    if (k.widest == 1) return (from_alpha - a.above) * (u * (1.0f / k.lam));
    return (from_alpha - rise(k.lam, r).above) * (u * (1.0f / k.alpha));
}

// exp(y) is `q`.
INLINE F mass_safe(const Part& k, F y, F q) {
    return k.lam == 1.0f ? q : k.lam == 0.0f ? splat(1.0f) : exp_safe(y * k.lam);
}

INLINE Terms sums_safe(const Part& k, F y, F r, F q) {
    F u = mass_safe(k, y, q);
    Rise a = rise(k.alpha, r);
    return {u, -u * a.over, value_safe(k, u, r, a)};
}

INLINE F slope_safe(const Part& k, F y, F r, F q) { return -mass_safe(k, y, q) * rise(k.alpha, r).over; }

// a x + b y without terms of coefficient 0, which would give 0 * -inf.
INLINE F exponent(float a, F x, float b, F y) {
    if (a == 0.0f) return b == 0.0f ? splat(0.0f) : y * b;
    return b == 0.0f ? x * a : x * a + y * b;
}

// See _difference in alpha_beta.py.
INLINE F difference(F start, F high, float gap, F r) {
    if (gap == 0.0f) return weigh(start, r);
    F x = r * gap;
    I near = (x < 1.0f) & (x > -1.0f);
    F e = rise(gap, near ? r : splat(0.0f)).e;
    return (near ? e * start : exp_any(high) - start) * (1.0f / gap);
}

INLINE F slope_any(const Part& k, F x, F y, F r) {
    return -difference(exp_any(exponent(0.0f, x, k.lam, y)), exponent(k.alpha, x, k.beta, y), k.alpha, r);
}

INLINE Terms sums_any(const Part& k, F x, F y, F r) {
    F u = exp_any(exponent(0.0f, x, k.lam, y));
    F at_alpha = exponent(k.alpha, x, k.beta, y), at_lam = exponent(k.lam, x, 0.0f, y);
    F rise_a = difference(u, at_alpha, k.alpha, r);
    if (k.spread == 0.0f) return {u, -rise_a, r * r * 0.5f};
    F far;
    if (k.widest == 0)
        far = (difference(u, at_lam, k.lam, r) - rise_a) * (1.0f / k.beta);
    else if (k.widest == 1)
        far = (difference(exp_any(at_alpha), at_lam, k.beta, r) - rise_a) * (1.0f / k.lam);
    else
        far = (difference(exp_any(at_alpha), at_lam, k.beta, r) - difference(u, at_lam, k.lam, r)) * (1.0f / k.alpha);
    F scaled = r * k.spread;
    I near = (scaled < 0.5f) & (scaled > -0.5f);
    F r_near = near ? r : splat(0.0f);
    return {u, -rise_a, near ? value_safe(k, u, r_near, rise(k.alpha, r_near)) : far};
}

struct Todi {
    F value, slope;
};

// ToDi.value and ToDi.grad_log_q.
template <bool SAFELY>
INLINE Todi todi(const Settings& k, F x, F y, F r) {
    F q = SAFELY ? exp_safe(y) : exp_any(y), p, w, one_minus_w, excess;  // excess = w p - (1 - w) q
    if (SAFELY && k.scale == 1.0f) {  // w = p / (p + q), and excess = p - q
        excess = q * rise(1.0f, r).e;
        p = q + excess;
        const F inverse = 1.0f / (p + q);
        w = p * inverse;
        one_minus_w = q * inverse;
    } else {
        p = SAFELY ? exp_safe(x) : exp_any(x);
        w = one_minus_w = splat(0.5f);
        if (k.scale != 0.0f) {
            const F z = exp_any(r * -k.scale);
            w = 1.0f / (1.0f + z);
            one_minus_w = z == INF ? splat(1.0f) : z * w;
        }
        const float gap = 1.0f + k.scale;  // w p = (1 - w) q exp(gap r)
        const I near = (r * gap < 1.0f) & (r * gap > -1.0f);
        excess = near ? one_minus_w * q * rise(gap, near ? r : splat(0.0f)).e : w * p - one_minus_w * q;
    }
    const F reverse = one_minus_w * q;
    F slope = -excess - (SAFELY ? reverse * r : weigh(reverse, r));
    if (k.scale != 0.0f && !k.detach) {
        const F mass = (p * one_minus_w + reverse) * w;
        slope -= (SAFELY ? mass * r : weigh(mass, r)) * k.scale;
    }
    return {SAFELY ? excess * r : weigh(excess, r), slope};
}

// ---------------------------------------------------------------- rows

// Four accumulators, because a dependent chain of compare and select is bound by latency.
constexpr int ABREAST = 4;

struct Range {
    float minimum, maximum;  // NaN is ignored
};

template <class T>
INLINE Range range(const T* logits, int64_t columns) {
    F low[ABREAST], high[ABREAST];
    for (int i = 0; i < ABREAST; ++i) low[i] = splat(INF), high[i] = splat(-INF);
    auto extend = [&](int i, F below, F above) __attribute__((always_inline)) {
        low[i] = below < low[i] ? below : low[i];
        high[i] = above > high[i] ? above : high[i];
    };
    int64_t c = 0;
    for (; c + ABREAST * LANES <= columns; c += ABREAST * LANES)
        for (int i = 0; i < ABREAST; ++i) {
            F a = load(logits + c + i * LANES);
            extend(i, a, a);
        }
    for (; c < columns; c += LANES) extend(0, load(logits + c, columns - c, INF), load(logits + c, columns - c, -INF));
    for (int i = 1; i < ABREAST; ++i) extend(0, low[i], high[i]);
    Range of = {low[0][0], high[0][0]};
    for (int lane = 1; lane < LANES; ++lane) {
        of.minimum = std::min(of.minimum, low[0][lane]);
        of.maximum = std::max(of.maximum, high[0][lane]);
    }
    return of;
}

// Returns the first column equal to `wanted`, or 0.
template <class T>
int64_t find(const T* logits, int64_t columns, float wanted) {
    int64_t c = 0;
    for (; c + TILE <= columns; c += TILE) {
        I found = {};
        for (int v = 0; v < TILE; v += LANES) found |= load(logits + c + v) == wanted;
        int32_t any = 0;
        for (int lane = 0; lane < LANES; ++lane) any |= found[lane];
        if (any) break;
    }
    for (; c < columns; ++c)
        if (to_float(logits[c]) == wanted) return c;
    return 0;
}

// Returns true if the short forms are valid for a tile: no logit further than `limit` below its base.
template <class S, class T>
INLINE bool is_safe(const S* s, const T* t, int64_t count, float s_base, float t_base, float limit) {
    return range(s, count).minimum - s_base >= -limit && range(t, count).minimum - t_base >= -limit;
}

INLINE float limit_of(const Settings& k) {
    float factor = 1.0f;
    for (int part = 0; part < k.num_parts; ++part) factor = std::max(factor, k.parts[part].spread);
    return SAFE / (factor * std::max(1.0f, k.inverse_temperature));
}

enum { Q, P, Q_AT_1, P_AT_1, PARTS, KL = PARTS + 6, NEGATIVE_P, NEGATIVE_Q, NUM_SUMS };

INLINE I lanes() {
    I lane = {};
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    return lane;
}

// `count` columns, at most LANES.
template <bool SAFELY, bool LABELS, bool WHOLE, class S, class T>
INLINE void add(
    F (&sums)[NUM_SUMS], const S* s, const T* t, int64_t count, float s_base, float t_base, const Settings& k
) {
    const bool at_t = k.inverse_temperature != 1.0f;
    F y = (WHOLE ? load(s) : load(s, count, s_base)) - s_base, x = (WHOLE ? load(t) : load(t, count, t_base)) - t_base;
    F r = x - y, y_at_1 = y, x_at_1 = x, r_at_1 = r;
    if (at_t) y *= k.inverse_temperature, x *= k.inverse_temperature, r *= k.inverse_temperature;
    F q = SAFELY ? exp_safe(y) : exp_any(y), p = SAFELY ? exp_safe(x) : exp_any(x);
    I inside = lanes() < int32_t(WHOLE ? LANES : count);
    if (!SAFELY) inside &= (x != -INF) | (y != -INF);
    auto add = [&](int i, F term) __attribute__((always_inline)) {
        sums[i] += SAFELY && WHOLE ? term : inside ? term : splat(0.0f);
    };
    add(Q, q);
    add(P, p);
    for (int part = 0; part < 2; ++part) {
        if (part == k.num_parts) break;
        Terms of = SAFELY ? sums_safe(k.parts[part], y, r, q) : sums_any(k.parts[part], x, y, r);
        add(PARTS + 3 * part, of.mass);
        add(PARTS + 3 * part + 1, of.slope);
        add(PARTS + 3 * part + 2, of.value);
    }
    if (!LABELS) return;
    if (at_t) {
        q = SAFELY ? exp_safe(y_at_1) : exp_any(y_at_1);
        p = SAFELY ? exp_safe(x_at_1) : exp_any(x_at_1);
        add(Q_AT_1, q);
        add(P_AT_1, p);
    }
    add(KL, SAFELY ? p * r_at_1 : weigh(p, r_at_1));
    add(NEGATIVE_P, SAFELY ? p * x_at_1 : weigh(p, x_at_1));
    add(NEGATIVE_Q, SAFELY ? q * y_at_1 : weigh(q, y_at_1));
}

template <bool SAFELY, bool LABELS, class S, class T>
INLINE void add_tile(
    double (&total)[NUM_SUMS][LANES], const S* s, const T* t, int64_t count, float s_base, float t_base, const Settings& k
) {
    F sums[NUM_SUMS] = {};
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES) add<SAFELY, LABELS, true>(sums, s + c, t + c, LANES, s_base, t_base, k);
    if (c < count) add<SAFELY, LABELS, false>(sums, s + c, t + c, count - c, s_base, t_base, k);
    for (int i = 0; i < NUM_SUMS; ++i)
        for (int lane = 0; lane < LANES; ++lane) total[i][lane] += sums[i][lane];
}

// `s_next` and `t_next`, the next row, are only prefetched.
template <bool LABELS, class S, class T>
void record_row(
    double* out, int64_t n, const S* s, const T* t, const S* s_next, const T* t_next, int64_t columns,
    int64_t first_column, const int64_t* label, const Settings& k
) {
    const Range s_range = range(s, columns), t_range = range(t, columns);
    const float s_max = s_range.maximum, t_max = t_range.maximum;
    // Where every logit is -inf, any finite base will do.
    const float s_base = s_max == -INF ? 0.0f : s_max, t_base = t_max == -INF ? 0.0f : t_max;
    const float limit = limit_of(k);
    const bool all_safe = s_range.minimum - s_base >= -limit && t_range.minimum - t_base >= -limit;
    double total[NUM_SUMS][LANES] = {};
    for (int64_t c = 0; c < columns; c += TILE) {
        const int64_t count = std::min<int64_t>(columns - c, TILE);
        for (int i = 0; i < TILE; i += 64 / sizeof(S)) __builtin_prefetch(s_next + c + i, 0, 2);
        for (int i = 0; i < TILE; i += 64 / sizeof(T)) __builtin_prefetch(t_next + c + i, 0, 2);
        if (all_safe || is_safe(s + c, t + c, count, s_base, t_base, limit))
            add_tile<true, LABELS>(total, s + c, t + c, count, s_base, t_base, k);
        else
            add_tile<false, LABELS>(total, s + c, t + c, count, s_base, t_base, k);
    }
    double sum[NUM_SUMS] = {};
    for (int i = 0; i < NUM_SUMS; ++i)
        for (int lane = 0; lane < LANES; ++lane) sum[i] += total[i][lane];

    auto put = [&](double number) {
        *out = number;
        out += n;
    };
    auto put_model = [&](auto* logits, float max, double sum_exp, double sum_exp_at_1) {
        // Comparisons ignore NaN, unlike eager. The sum is NaN only if a logit is NaN or the maximum is inf.
        put(sum_exp != sum_exp && max != INF ? std::numeric_limits<double>::quiet_NaN() : max);
        put(sum_exp);
        if (!LABELS) return;
        const int64_t column = *label - first_column;
        put(column >= 0 && column < columns ? to_float(logits[column]) : -INF);
        put(double(find(logits, columns, max) + first_column));
        if (k.inverse_temperature != 1.0f) put(sum_exp_at_1);
    };
    put_model(s, s_max, sum[Q], sum[Q_AT_1]);
    put_model(t, t_max, sum[P], sum[P_AT_1]);
    for (int i = 0; i < 3 * k.num_parts; ++i) put(sum[PARTS + i]);
    if (LABELS)
        for (int i : {KL, NEGATIVE_P, NEGATIVE_Q}) put(sum[i]);
}

struct Scalars {  // per row, as in eager.local_gradient
    float s_base, t_base, q_log, q_log_at_1, p_log, log_shift, slope_sum, of_divergence, of_cross_entropy;
};

// y, x and r from the row's raw differences to its bases.
INLINE void shift(F& y, F& x, F& r, const Scalars& row, const Settings& k) {
    r = x - y;
    if (k.inverse_temperature != 1.0f)
        y *= k.inverse_temperature, x *= k.inverse_temperature, r *= k.inverse_temperature;
    y -= row.q_log;
    x -= row.p_log;
    r -= row.log_shift;
}

// Log-probabilities are lower than logits relative to their maximum.
INLINE float limit_below(const Scalars& row, const Settings& k) {
    return limit_of(k) - std::max({row.q_log, row.p_log, row.q_log_at_1, 0.0f});
}

// Sums of ToDi's value and slope.
template <class S, class T>
void second_row(double (&sum)[2], const S* s, const T* t, int64_t columns, const Scalars& row, const Settings& k) {
    const float limit = limit_below(row, k);
    double total[2][LANES] = {};
    for (int64_t c = 0; c < columns; c += TILE) {
        const int64_t tile = std::min<int64_t>(columns - c, TILE);
        const bool safe = is_safe(s + c, t + c, tile, row.s_base, row.t_base, limit);
        F sums[2] = {};
        for (int64_t v = c; v < c + tile; v += LANES) {
            const int64_t count = columns - v;
            F y = load(s + v, count, row.s_base) - row.s_base, x = load(t + v, count, row.t_base) - row.t_base, r;
            shift(y, x, r, row, k);
            Todi of = safe ? todi<true>(k, x, y, r) : todi<false>(k, x, y, r);
            I inside = lanes() < int32_t(std::min<int64_t>(count, LANES));
            inside &= (x != -INF) | (y != -INF);
            sums[0] += inside ? of.value : splat(0.0f);
            sums[1] += inside ? of.slope : splat(0.0f);
        }
        for (int i = 0; i < 2; ++i)
            for (int lane = 0; lane < LANES; ++lane) total[i][lane] += sums[i][lane];
    }
    for (int i = 0; i < 2; ++i)
        for (int lane = 0; lane < LANES; ++lane) sum[i] += total[i][lane];
}

// `count` columns, at most LANES.
template <bool SAFELY, bool WHOLE, class S, class T>
INLINE void write_gradient(
    S* out, const S* s, const T* t, int64_t count, int64_t label_column, const Scalars& row, const Settings& k
) {
    const bool at_t = k.inverse_temperature != 1.0f;
    F y_at_1 = (WHOLE ? load(s) : load(s, count, row.s_base)) - row.s_base, gradient = {}, q = {};
    if (row.of_divergence != 0.0f) {
        F x = (WHOLE ? load(t) : load(t, count, row.t_base)) - row.t_base, y = y_at_1, r;
        shift(y, x, r, row, k);
        q = SAFELY ? exp_safe(y) : exp_any(y);
        F slope;
        if (k.todi)
            slope = todi<SAFELY>(k, x, y, r).slope;
        else
            slope = SAFELY ? slope_safe(k.parts[0], y, r, q) : slope_any(k.parts[0], x, y, r);
        if (!SAFELY) slope = (x != -INF) | (y != -INF) ? slope : splat(0.0f);
        gradient = (slope - q * row.slope_sum) * row.of_divergence;
    }
    if (row.of_cross_entropy != 0.0f) {
        if (at_t || row.of_divergence == 0.0f) {
            F z = y_at_1 - row.q_log_at_1;
            q = SAFELY ? exp_safe(z) : exp_any(z);
        }
        F one = lanes() == int32_t(label_column) ? splat(1.0f) : splat(0.0f);
        gradient += (q - one) * row.of_cross_entropy;
    }
    WHOLE ? store(out, gradient) : store(out, gradient, count);
}

template <bool SAFELY, class S, class T>
INLINE void write_tile(
    S* out, const S* s, const T* t, int64_t count, int64_t label_column, const Scalars& row, const Settings& k
) {
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES)
        write_gradient<SAFELY, true>(out + c, s + c, t + c, LANES, label_column - c, row, k);
    if (c < count) write_gradient<SAFELY, false>(out + c, s + c, t + c, count - c, label_column - c, row, k);
}

template <class S, class T>
void gradient_row(
    S* out, const S* s, const T* t, int64_t columns, int64_t label_column, const Scalars& row, const Settings& k
) {
    if (row.of_divergence == 0.0f && row.of_cross_entropy == 0.0f) {
        std::memset(static_cast<void*>(out), 0, sizeof(S) * columns);
        return;
    }
    const float limit = limit_below(row, k);
    for (int64_t c = 0; c < columns; c += TILE) {
        const int64_t count = std::min<int64_t>(columns - c, TILE);
        const int64_t label = label_column >= c && label_column - c < count ? label_column - c : -1;
        if (is_safe(s + c, t + c, count, row.s_base, row.t_base, limit))
            write_tile<true>(out + c, s + c, t + c, count, label, row, k);
        else
            write_tile<false>(out + c, s + c, t + c, count, label, row, k);
    }
}

template <class Call>
void by_dtype(const Logits& student, const Logits& teacher, Call call) {
    auto with = [&](auto* s) {
        teacher.is_bf16 ? call(s, static_cast<const bf16*>(teacher.first))
                        : call(s, static_cast<const float*>(teacher.first));
    };
    student.is_bf16 ? with(static_cast<const bf16*>(student.first)) : with(static_cast<const float*>(student.first));
}

}  // namespace

// `record` is [fields, n]; `labels` [n] or null.
extern "C" void abkd_record(
    double* record, Logits student, Logits teacher, const int64_t* labels, int64_t n, int64_t columns,
    int64_t first_column, const Settings* settings
) {
    const Settings& k = *settings;
    by_dtype(student, teacher, [&](auto* s, auto* t) {
        const int64_t s_stride = student.row_stride, t_stride = teacher.row_stride;
#pragma omp parallel for num_threads(k.threads) if (k.threads > 1)
        for (int64_t row = 0; row < n; ++row) {
            auto *s_row = s + row * s_stride, *s_next = s_row + s_stride;
            auto *t_row = t + row * t_stride, *t_next = t_row + t_stride;
            if (labels)
                record_row<true>(
                    record + row, n, s_row, t_row, s_next, t_next, columns, first_column, labels + row, k
                );
            else
                record_row<false>(record + row, n, s_row, t_row, s_next, t_next, columns, first_column, nullptr, k);
        }
    });
}

// `values` and `slopes` are [n] or null; `scalars` is [4, n], contiguous, as in eager.local_second_record.
extern "C" void abkd_second_record(
    double* values, double* slopes, Logits student, Logits teacher, int64_t n, int64_t columns, const double* scalars,
    const Settings* settings
) {
    const Settings& k = *settings;
    by_dtype(student, teacher, [&](auto* s, auto* t) {
#pragma omp parallel for num_threads(k.threads) if (k.threads > 1)
        for (int64_t row = 0; row < n; ++row) {
            auto scalar = [&](int i) { return scalars[i * n + row]; };
            Scalars of = {};
            of.s_base = scalar(0), of.q_log = scalar(1), of.t_base = scalar(2), of.p_log = scalar(3);
            of.log_shift = scalar(3) - scalar(1);
            double sum[2] = {};
            second_row(sum, s + row * student.row_stride, t + row * teacher.row_stride, columns, of, k);
            if (values) values[row] = sum[0];
            if (slopes) slopes[row] = sum[1];
        }
    });
}

// `out` is [n, columns] in the student's dtype and may be the student's logits; `scalars` is [6, n], contiguous, as
// in eager.local_gradient; `labels`, `of_divergence` and `of_cross_entropy` [n] or null.
extern "C" void abkd_gradient(
    void* out, int64_t out_stride, Logits student, Logits teacher, const int64_t* labels, int64_t n, int64_t columns,
    int64_t first_column, const double* scalars, const float* of_divergence, const float* of_cross_entropy,
    const Settings* settings
) {
    const Settings& k = *settings;
    by_dtype(student, teacher, [&](auto* s, auto* t) {
        auto* rows = static_cast<std::remove_const_t<std::remove_pointer_t<decltype(s)>>*>(out);
#pragma omp parallel for num_threads(k.threads) if (k.threads > 1)
        for (int64_t row = 0; row < n; ++row) {
            auto scalar = [&](int i) { return scalars[i * n + row]; };
            const int64_t label = labels ? labels[row] : -1;
            Scalars of;
            of.s_base = scalar(0), of.q_log = scalar(1), of.q_log_at_1 = scalar(2), of.t_base = scalar(3);
            of.p_log = scalar(4), of.slope_sum = scalar(5), of.log_shift = scalar(4) - scalar(1);
            of.of_divergence = of_divergence ? of_divergence[row] * k.inverse_temperature : 0.0f;
            of.of_cross_entropy = of_cross_entropy && label >= 0 ? of_cross_entropy[row] : 0.0f;
            const int64_t column = label - first_column;
            gradient_row(
                rows + row * out_stride, s + row * student.row_stride, t + row * teacher.row_stride, columns,
                label >= 0 && column >= 0 && column < columns ? column : -1, of, k
            );
        }
    });
}
