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
#include <vector>

// ---------------------------------------------------------------- arguments; the layout must match cpp.py

enum Kind : int32_t { ALPHA_BETA, TODI, SKEW_FORWARD, SKEW_REVERSE, JENSEN_SHANNON, TOTAL_VARIATION, SEVERAL };

struct Gap {
    float size, inverse;  // the inverse of 0 is not used
};

struct Part {
    int32_t kind;
    float weight;
    Gap alpha, beta, lam;  // of alpha-beta
    float spread;
    int32_t widest;     // which of |beta|, |lam|, |alpha| is the spread
    float scale;        // of ToDi
    float share, rest;  // of a mixture, as in its class; rest = 1 - share
    int32_t detach;
};

struct Settings {
    float inverse_temperature;
    int32_t threads, num_parts;
    // Of a sum of several: the parts but the last ones, forward and reverse KL and total variation, whose weights follow.
    int32_t num_others;
    float forward, reverse, total_variation;
    int32_t mirrored;  // some part needs exp(-r)
    Part parts[16];
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

INLINE void store(float* to, F x) { std::memcpy(to, &x, sizeof x); }

INLINE void store(bf16* to, F x) {
    U bits = as<U>(x);
    U nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
    H half = __builtin_convertvector(x == x ? nearest : (bits >> 16) | 0x40, H);
    std::memcpy(to, &half, sizeof half);
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
    F e, over, above;  // exp(g r) - 1; that / g; (exp(g r) - 1 - g r) / g
    F exp, turn;       // E = exp(g r); g r E - E + 1. All to full precision.
};

// For gap g, the limit at 0. |g r| <= SAFE.
INLINE Rise rise(Gap gap, F r) {
    if (gap.size == 0.0f) return {splat(0.0f), r, splat(0.0f), splat(1.0f), splat(0.0f)};
    F x = r * gap.size;
    Reduced part = reduce(x);
    F scale = power_of_2(as<U>(part.shifted));
    F e = (part.r + part.above) * scale + (scale - 1.0f), exp = (part.r + part.above) * scale + scale;
    I near = part.shifted == SHIFTER;
    return {e, e * gap.inverse, (near ? part.above : e - x) * gap.inverse, exp, near ? x * e - part.above : x * exp - e};
}

// ---------------------------------------------------------------- logarithms

struct Log {
    F log, below;  // log w; w - 1 - log w, to full precision near w = 1
};

// For normal w > 0; m = w - 1 to full precision where w is near 1. `below` / m^2 on |log w| <= log(2) / 2 is interpolated
// by a polynomial of degree 8 at the Chebyshev nodes, with a relative error of 1.2e-7.
INLINE Log logarithm(F w, F m) {
    I n = (as<I>(w) - 0x3f3504f3) >> 23;  // w / 2^n is between sqrt(1/2) and sqrt(2)
    I near = n == 0;
    F f = near ? m : as<F>(as<I>(w) - (n << 23)) - 1.0f;
    F g = f * 0.0767364150167f - 0.1272267278801f;
    g = g * f + 0.1312755565129f;
    g = g * f - 0.1420485595257f;
    g = g * f + 0.1662664562913f;
    g = g * f - 0.2000123446109f;
    g = g * f + 0.2500078123981f;
    g = g * f - 0.3333333002835f;
    g = g * f + 0.4999999764977f;
    F below = f * f * g;
    F log = __builtin_convertvector(n, F) * 0.69314718f + (f - below);
    return {log, near ? below : m - log};
}

// ---------------------------------------------------------------- divergences

// mass * amount with 0 * inf = 0.
INLINE F weigh(F mass, F amount) { return mass == 0.0f ? splat(0.0f) : mass * amount; }

struct Terms {
    F mass, slope, value;
};

constexpr Gap ONE = {1.0f, 1.0f}, MINUS_ONE = {-1.0f, -1.0f};

// What several parts share: rise(1, r) and, if needed, rise(-1, r).
struct Shared {
    Rise up, down;

    INLINE Shared(F r, bool mirrored) : up(rise(ONE, r)), down{} {
        if (!mirrored) return;
        const F inverse = 1.0f / up.exp;
        down = {-up.e * inverse, up.e * inverse, -up.turn * inverse, inverse, up.above * inverse};
    }
};

INLINE Rise rise(Gap gap, F r, const Shared* shared) {
    return shared && gap.size == 1.0f ? shared->up : rise(gap, r);
}

INLINE Rise fall(F r, const Shared* shared) { return shared ? shared->down : rise(MINUS_ONE, r); }

// F = u phi(r), as in AlphaBeta: divided differences of exp(x r) at {0, alpha, lam}, without the linear parts, which
// cancel.
INLINE F value_safe(const Part& k, F u, F r, const Rise& a, const Shared* shared = nullptr) {
    if (k.spread == 0.0f) return r * r * 0.5f;
    if (k.widest == 0) return (rise(k.lam, r, shared).above - a.above) * (u * k.beta.inverse);
    Rise b = rise(k.beta, r, shared);
    F from_alpha = b.above + a.e * b.over;
    if (k.widest == 1) return (from_alpha - a.above) * (u * k.lam.inverse);
    from_alpha = a.e < -0.5f ? b.over * a.exp - r : from_alpha;  // alpha and beta have opposite signs
    return (from_alpha - rise(k.lam, r, shared).above) * (u * k.alpha.inverse);
}

// exp(y) is `q`.
INLINE F mass_safe(const Part& k, F y, F q) {
    return k.lam.size == 1.0f ? q : k.lam.size == 0.0f ? splat(1.0f) : exp_safe(y * k.lam.size);
}

INLINE Terms sums_safe(const Part& k, F y, F r, F q, const Shared* shared = nullptr) {
    F u = mass_safe(k, y, q);
    Rise a = rise(k.alpha, r, shared);
    return {u, -u * a.over, value_safe(k, u, r, a, shared)};
}

// a x + b y without terms of coefficient 0, which would give 0 * -inf.
INLINE F exponent(float a, F x, float b, F y) {
    if (a == 0.0f) return b == 0.0f ? splat(0.0f) : y * b;
    return b == 0.0f ? x * a : x * a + y * b;
}

// See _difference in alpha_beta.py.
INLINE F difference(F start, F high, Gap gap, F r) {
    if (gap.size == 0.0f) return weigh(start, r);
    F x = r * gap.size;
    I near = (x < 1.0f) & (x > -1.0f);
    F e = rise(gap, near ? r : splat(0.0f)).e;
    return (near ? e * start : exp_any(high) - start) * gap.inverse;
}

INLINE Terms sums_any(const Part& k, F x, F y, F r) {
    F u = exp_any(exponent(0.0f, x, k.lam.size, y));
    F at_alpha = exponent(k.alpha.size, x, k.beta.size, y), at_lam = exponent(k.lam.size, x, 0.0f, y);
    F rise_a = difference(u, at_alpha, k.alpha, r);
    if (k.spread == 0.0f) return {u, -rise_a, r * r * 0.5f};
    F far;
    if (k.widest == 0)
        far = (difference(u, at_lam, k.lam, r) - rise_a) * k.beta.inverse;
    else if (k.widest == 1)
        far = (difference(exp_any(at_alpha), at_lam, k.beta, r) - rise_a) * k.lam.inverse;
    else
        far = (difference(exp_any(at_alpha), at_lam, k.beta, r) - difference(u, at_lam, k.lam, r)) * k.alpha.inverse;
    F scaled = r * k.spread;
    I near = (scaled < 0.5f) & (scaled > -0.5f);
    F r_near = near ? r : splat(0.0f);
    return {u, -rise_a, near ? value_safe(k, u, r_near, rise(k.alpha, r_near)) : far};
}

// Value and slope, F and h of the class of the same name in losses/.
struct Both {
    F value, slope;
};

template <bool SAFELY>
INLINE Both todi(const Part& k, F x, F, F r, F q, const Shared* shared) {
    F p, w, one_minus_w, excess;       // excess = w p - (1 - w) q
    if (SAFELY && k.scale == 1.0f) {  // w = p / (p + q), and excess = p - q
        excess = q * rise(ONE, r, shared).e;
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
        excess = near ? one_minus_w * q * rise(Gap{gap, 1.0f}, near ? r : splat(0.0f)).e : w * p - one_minus_w * q;
    }
    const F reverse = one_minus_w * q;
    F slope = -excess - (SAFELY ? reverse * r : weigh(reverse, r));
    if (k.scale != 0.0f && !k.detach) {
        const F mass = (p * one_minus_w + reverse) * w;
        slope -= (SAFELY ? mass * r : weigh(mass, r)) * k.scale;
    }
    return {SAFELY ? excess * r : weigh(excess, r), slope};
}

// Up to here the ratio of two probabilities is finite, whatever they are.
constexpr float NEAR = 40.0f;

INLINE I is_near(F r) { return (r < NEAR) & (r > -NEAR); }

// M = share a + rest b, for r = log(a/b).
struct Mixture {
    Rise rise;     // of r
    F m, ratio;    // M/b - 1 and M/b
    Log log;       // of M/b
};

// |r| <= SAFE.
INLINE Mixture mixture(float share, float rest, const Rise& rise) {
    F m = rise.e * share, ratio = rise.exp * share + rest;
    return {rise, m, ratio, logarithm(ratio, m)};
}

// The same for r that may be infinite or NaN, without what may overflow.
struct FarMixture {
    F log_a, log_b;  // log(M/a), log(M/b)
    F of_a, of_b;    // a/M, b/M
};

INLINE FarMixture far_mixture(float share, float rest, F r) {
    I up = r > 0.0f;
    F less = exp_any(up ? -r : r), ratio = up ? less * rest + share : less * share + rest;  // M over the larger of a, b
    F log = r == r ? logarithm(ratio, ratio - 1.0f).log : r, none = splat(0.0f), inverse = 1.0f / ratio;
    return {(up ? none : -r) + log, (up ? r : none) + log, up ? inverse : less * inverse, up ? less * inverse : inverse};
}

template <bool SAFELY>
INLINE Both skew_forward(const Part& k, F x, F, F r, F q, const Shared* shared) {
    F p = SAFELY ? exp_safe(x) : exp_any(x);
    F r_near = SAFELY ? r : is_near(r) ? r : splat(0.0f);
    Mixture of = mixture(k.rest, k.share, fall(r_near, shared));  // of q and p
    Both near = {p * of.log.below, q * (of.rise.e / of.ratio) * (k.rest * k.rest)};
    if (SAFELY) return near;
    FarMixture far = far_mixture(k.rest, k.share, -r);
    I is = is_near(r);
    return {
        is ? near.value : (q - p) * k.rest - weigh(p, far.log_b),
        is ? near.slope : (q - p) * far.of_a * (k.rest * k.rest),
    };
}

template <bool SAFELY>
INLINE Both skew_reverse(const Part& k, F x, F, F r, F q, const Shared* shared) {
    F r_near = SAFELY ? r : is_near(r) ? r : splat(0.0f);
    Mixture of = mixture(k.rest, k.share, rise(ONE, r_near, shared));  // of p and q
    Both near = {q * of.log.below, q * -of.log.log};
    if (!k.detach) near.slope = q * (of.m / of.ratio * k.share - of.log.log);
    if (SAFELY) return near;
    F p = exp_any(x);
    FarMixture far = far_mixture(k.rest, k.share, r);
    I is = is_near(r);
    F slope = -weigh(q, far.log_b);
    if (!k.detach) slope += (p - q) * far.of_b * (k.share * k.rest);
    return {is ? near.value : (p - q) * k.rest - weigh(q, far.log_b), is ? near.slope : slope};
}

// From the model with the larger share, so that little cancels: with c the smaller share and e = exp(r) - 1,
// F / b = c (r exp(r) - e) - (1 + c e) log(1 + c e) + c e.
template <bool SAFELY>
INLINE Both jensen_shannon(const Part& k, F x, F, F r, F q, const Shared* shared) {
    const bool from_q = k.share <= 0.5f;
    const float c = from_q ? k.share : k.rest;
    F r_near = SAFELY ? r : is_near(r) ? r : splat(0.0f);
    Mixture of = mixture(c, from_q ? k.rest : k.share, from_q ? rise(ONE, r_near, shared) : fall(r_near, shared));
    F b = q;
    if (!from_q) b = SAFELY ? exp_safe(x) : exp_any(x);
    Both near;
    near.value = b * ((of.rise.turn - of.rise.e * of.log.log) * c + of.log.below);
    near.slope = q * (from_q ? of.log.log : of.log.log + r_near) * -k.rest;
    if (SAFELY) return near;
    F p = exp_any(x);
    FarMixture far = far_mixture(k.share, k.rest, r);
    I is = is_near(r);
    F of_q = weigh(q, far.log_b) * -k.rest;
    return {is ? near.value : of_q - weigh(p, far.log_a) * k.share, is ? near.slope : of_q};
}

template <bool SAFELY>
INLINE Both total_variation(const Part&, F x, F, F r, F q, const Shared* shared) {
    F difference;
    if (SAFELY) {
        difference = q * rise(ONE, r, shared).e;
    } else {
        I is = is_near(r);
        difference = is ? q * rise(ONE, is ? r : splat(0.0f)).e : exp_any(x) - q;
    }
    F minus_sign = r > 0.0f ? splat(-0.5f) : r < 0.0f ? splat(0.5f) : splat(0.0f);
    return {(difference < 0.0f ? -difference : difference) * 0.5f, q * minus_sign};
}

template <bool SAFELY>
INLINE Both alpha_beta(const Part& k, F x, F y, F r, F q, const Shared* shared) {
    Terms of = SAFELY ? sums_safe(k, y, r, q, shared) : sums_any(k, x, y, r);
    return {of.value, of.slope};
}

template <bool SAFELY, Kind KIND>
INLINE Both part(const Part& k, F x, F y, F r, F q, const Shared* shared) {
    constexpr auto of = KIND == ALPHA_BETA     ? alpha_beta<SAFELY>
                        : KIND == TODI         ? todi<SAFELY>
                        : KIND == SKEW_FORWARD ? skew_forward<SAFELY>
                        : KIND == SKEW_REVERSE ? skew_reverse<SAFELY>
                        : KIND == TOTAL_VARIATION ? total_variation<SAFELY>
                                                  : jensen_shannon<SAFELY>;
    Both result = of(k, x, y, r, q, shared);
    return {result.value * k.weight, result.slope * k.weight};
}

// The weighted divergence: a single part of a kind known here, or SEVERAL.
template <bool SAFELY, Kind KIND>
INLINE Both divergence(const Settings& k, F x, F y, F r, F q) {
    if constexpr (KIND != SEVERAL) {
        return part<SAFELY, KIND>(k.parts[0], x, y, r, q, nullptr);
    } else {
        const Shared of_sum(SAFELY ? r : F{}, k.mirrored), *shared = SAFELY ? &of_sum : nullptr;
        Both sum = {};
        if (SAFELY) {
            sum.value = q * (shared->up.turn * k.forward + shared->up.above * k.reverse);
            sum.slope = -q * (shared->up.e * k.forward + r * k.reverse);
            if (k.total_variation != 0.0f) {
                const Both of = total_variation<SAFELY>(k.parts[0], x, y, r, q, shared);
                sum.value += of.value * k.total_variation;
                sum.slope += of.slope * k.total_variation;
            }
        }
        const int num_parts = SAFELY ? k.num_others : k.num_parts;
        for (int i = 0; i < num_parts; ++i) {
            Both of;
            switch (k.parts[i].kind) {
                case ALPHA_BETA: of = part<SAFELY, ALPHA_BETA>(k.parts[i], x, y, r, q, shared); break;
                case TODI: of = part<SAFELY, TODI>(k.parts[i], x, y, r, q, shared); break;
                case SKEW_FORWARD: of = part<SAFELY, SKEW_FORWARD>(k.parts[i], x, y, r, q, shared); break;
                case SKEW_REVERSE: of = part<SAFELY, SKEW_REVERSE>(k.parts[i], x, y, r, q, shared); break;
                case JENSEN_SHANNON: of = part<SAFELY, JENSEN_SHANNON>(k.parts[i], x, y, r, q, shared); break;
                default: of = SAFELY ? Both{} : part<false, TOTAL_VARIATION>(k.parts[i], x, y, r, q, shared);
            }
            sum.value += of.value;
            sum.slope += of.slope;
        }
        return sum;
    }
}

// ---------------------------------------------------------------- rows

// Four accumulators, because a dependent chain of compare and select is bound by latency.
constexpr int ABREAST = 4;

// NaN is ignored.
template <class T>
INLINE float maximum(const T* logits, int64_t columns) {
    F high[ABREAST];
    for (int i = 0; i < ABREAST; ++i) high[i] = splat(-INF);
    auto extend = [&](int i, F above) __attribute__((always_inline)) { high[i] = above > high[i] ? above : high[i]; };
    int64_t c = 0;
    for (; c + ABREAST * LANES <= columns; c += ABREAST * LANES)
        for (int i = 0; i < ABREAST; ++i) extend(i, load(logits + c + i * LANES));
    for (; c < columns; c += LANES) extend(0, load(logits + c, columns - c, -INF));
    for (int i = 1; i < ABREAST; ++i) extend(0, high[i]);
    float of = high[0][0];
    for (int lane = 1; lane < LANES; ++lane) of = std::max(of, high[0][lane]);
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

// Logits of some columns of a row, and the row's bases. Passes over them do not depend on the dtypes, which keeps the
// number of variants low.
struct Columns {
    const float *s, *t;
    float s_base, t_base;
};

// Up to TILE columns of a row.
struct alignas(64) Tile {
    float s_copy[TILE], t_copy[TILE];
    Columns all, last;     // `last` has the columns that do not fill a vector; its lanes without a column have the bases
    int whole, count;      // columns in whole vectors, and all of them
    bool safe, last_safe;  // the short forms are valid: no NaN, nothing further below than `limit`

    template <class S, class T>
    INLINE Tile(const S* s, const T* t, int64_t columns, float s_base, float t_base, float limit)
        : all{s_copy, t_copy, s_base, t_base}, last(all) {
        count = int(std::min<int64_t>(columns, TILE));
        whole = count / LANES * LANES;
        if constexpr (std::is_same_v<S, float>) all.s = s;
        if constexpr (std::is_same_v<T, float>) all.t = t;
        I fit = ~I{};
        auto check = [&](F of_s, F of_t) __attribute__((always_inline)) {
            fit &= (of_s - s_base >= -limit) & (of_t - t_base >= -limit);
        };
        auto checked = [&] {
            int32_t every = -1;
            for (int lane = 0; lane < LANES; ++lane) every &= fit[lane];
            return every != 0;
        };
        for (int v = 0; v < whole; v += LANES) {
            F of_s = load(s + v), of_t = load(t + v);
            check(of_s, of_t);
            if (!std::is_same_v<S, float>) store(s_copy + v, of_s);
            if (!std::is_same_v<T, float>) store(t_copy + v, of_t);
        }
        safe = checked();
        if (whole == count) return;
        F of_s = load(s + whole, count - whole, s_base), of_t = load(t + whole, count - whole, t_base);
        fit = ~I{};
        check(of_s, of_t);
        last_safe = checked();
        store(s_copy + whole, of_s);
        store(t_copy + whole, of_t);
    }

    // Calls `safely` or `anyhow` for the whole vectors, and for what is left of a row.
    template <class Call, class... Arguments>
    INLINE void run(Call safely, Call anyhow, Arguments&&... arguments) const {
        (safe ? safely : anyhow)(all, 0, whole, arguments...);
        if (whole < count) (last_safe ? safely : anyhow)(last, whole, count, arguments...);
    }
};

struct Scalars {  // per row, as in eager.local_gradient
    float s_base, t_base, q_log, q_log_at_1, p_log, log_shift, slope_sum, of_divergence, of_cross_entropy;
};

using Lanes = double[LANES];

// A pass over a tile: the one with the short forms, and the one for any logits.
template <class... Arguments>
struct Pass {
    void (*safely)(Columns, int, int, Arguments...);
    void (*anyhow)(Columns, int, int, Arguments...);
};

using AddRecord = Pass<Lanes*, Lanes (*)[3], const Settings&>;
using AddBoth = Pass<Lanes*, const Scalars&, const Settings&>;
template <class S>
using WriteGradient = Pass<S*, int, const Scalars&, const Settings&>;

INLINE float limit_of(const Settings& k) {
    float factor = 1.0f;
    for (int part = 0; part < k.num_parts; ++part) factor = std::max(factor, k.parts[part].spread);
    return SAFE / (factor * std::max(1.0f, k.inverse_temperature));
}

enum { Q, P, Q_AT_1, P_AT_1, KL, NEGATIVE_P, NEGATIVE_Q, NUM_SUMS };

INLINE I lanes() {
    I lane = {};
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    return lane;
}

// Only the first `count` lanes have columns.
INLINE void add_to(Lanes& total, F sum, int count) {
    if (count >= LANES)
        for (int lane = 0; lane < LANES; ++lane) total[lane] += sum[lane];
    else
        for (int lane = 0; lane < count; ++lane) total[lane] += sum[lane];
}

enum Parts { NONE, FIRST, ALL };

// Sums of the models' fields, and of mass, slope and value of the parts.
template <bool SAFELY, bool LABELS, Parts PARTS>
void add_record(Columns at, int first, int end, Lanes* models, Lanes (*parts)[3], const Settings& k) {
    const bool at_t = k.inverse_temperature != 1.0f;
    const int num_parts = PARTS == NONE ? 0 : PARTS == FIRST ? 1 : k.num_parts;
    F sums[NUM_SUMS] = {}, of_parts[PARTS == ALL ? 16 : 1][3];
    for (int i = 0; i < num_parts; ++i) of_parts[i][0] = of_parts[i][1] = of_parts[i][2] = F{};
    for (int v = first; v < end; v += LANES) {
        F y = load(at.s + v) - at.s_base, x = load(at.t + v) - at.t_base, r = x - y;
        const F y_at_1 = y, x_at_1 = x, r_at_1 = r;
        if (at_t) y *= k.inverse_temperature, x *= k.inverse_temperature, r *= k.inverse_temperature;
        F q = SAFELY ? exp_safe(y) : exp_any(y), p = SAFELY ? exp_safe(x) : exp_any(x);
        I inside = (x != -INF) | (y != -INF);
        auto add = [&](F& sum, F term) __attribute__((always_inline)) {
            sum += SAFELY ? term : inside ? term : splat(0.0f);
        };
        add(sums[Q], q);
        add(sums[P], p);
        const Shared shared(SAFELY ? r : F{}, false);
        for (int i = 0; i < num_parts; ++i) {
            const Part& part = k.parts[i];
            Terms of;
            if (SAFELY)
                of = sums_safe(part, y, r, q, PARTS == ALL ? &shared : nullptr);
            else
                of = sums_any(part, x, y, r);
            add(of_parts[i][0], of.mass);
            add(of_parts[i][1], of.slope);
            add(of_parts[i][2], of.value);
        }
        if (!LABELS) continue;
        if (at_t) {
            q = SAFELY ? exp_safe(y_at_1) : exp_any(y_at_1);
            p = SAFELY ? exp_safe(x_at_1) : exp_any(x_at_1);
            add(sums[Q_AT_1], q);
            add(sums[P_AT_1], p);
        }
        add(sums[KL], SAFELY ? p * r_at_1 : weigh(p, r_at_1));
        add(sums[NEGATIVE_P], SAFELY ? p * x_at_1 : weigh(p, x_at_1));
        add(sums[NEGATIVE_Q], SAFELY ? q * y_at_1 : weigh(q, y_at_1));
    }
    for (int i = 0; i < NUM_SUMS; ++i) add_to(models[i], sums[i], end - first);
    for (int i = 0; i < num_parts; ++i)
        for (int field = 0; field < 3; ++field) add_to(parts[i][field], of_parts[i][field], end - first);
}

// `s_next` and `t_next`, the next row, are only prefetched.
template <bool LABELS, class S, class T>
void record_row(
    double* out, int64_t n, const S* s, const T* t, const S* s_next, const T* t_next, int64_t columns,
    int64_t first_column, const int64_t* label, const AddRecord& pass, const Settings& k
) {
    const float s_max = maximum(s, columns), t_max = maximum(t, columns);
    // Where every logit is -inf, any finite base will do.
    const float s_base = s_max == -INF ? 0.0f : s_max, t_base = t_max == -INF ? 0.0f : t_max;
    const float limit = limit_of(k);
    Lanes models[NUM_SUMS] = {}, parts[16][3];
    std::memset(parts, 0, k.num_parts * sizeof parts[0]);
    for (int64_t c = 0; c < columns; c += TILE) {
        for (int i = 0; i < TILE; i += 64 / sizeof(S)) __builtin_prefetch(s_next + c + i, 0, 2);
        for (int i = 0; i < TILE; i += 64 / sizeof(T)) __builtin_prefetch(t_next + c + i, 0, 2);
        const Tile tile(s + c, t + c, columns - c, s_base, t_base, limit);
        tile.run(pass.safely, pass.anyhow, models, parts, k);
    }
    auto sum = [](const Lanes& of) {
        double all = 0.0;
        for (int lane = 0; lane < LANES; ++lane) all += of[lane];
        return all;
    };
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
    put_model(s, s_max, sum(models[Q]), sum(models[Q_AT_1]));
    put_model(t, t_max, sum(models[P]), sum(models[P_AT_1]));
    for (int i = 0; i < k.num_parts; ++i)
        for (auto& of : parts[i]) put(sum(of));
    if (LABELS)
        for (int i : {KL, NEGATIVE_P, NEGATIVE_Q}) put(sum(models[i]));
}

// The record of a student compared with itself, without what repeats, in the columns but the kept ones. The kept logits
// go to `of_kept`; 0 for those of other ranks. `rest` has room for a row.
template <class S>
void rest_row(
    double* out, double* of_kept, int64_t n, const S* s, int64_t columns, int64_t first_column, int64_t label,
    const int64_t* kept, int64_t num_kept, float* rest, float inverse_temperature
) {
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) store(rest + c, load(s + c));
    for (; c < columns; ++c) rest[c] = to_float(s[c]);
    for (int64_t i = 0; i < num_kept; ++i) {
        const bool here = kept[i] >= 0 && kept[i] < columns;
        of_kept[i * n] = here ? to_float(s[kept[i]]) : 0.0;
        if (here) rest[kept[i]] = -INF;
    }
    const float max = maximum(rest, columns), base = max == -INF ? 0.0f : max;
    const bool at_t = inverse_temperature != 1.0f;
    Lanes sums[3] = {};
    for (c = 0; c < columns; c += TILE) {
        const int64_t count = std::min<int64_t>(columns - c, TILE);
        F of_tile[3] = {};
        for (int64_t v = 0; v < count; v += LANES) {
            const F y = load(rest + c + v, count - v, -INF) - base, q = exp_any(y);
            of_tile[0] += q;
            of_tile[1] += weigh(q, y);
            if (at_t) of_tile[2] += exp_any(y * inverse_temperature);
        }
        for (int i = 0; i < 3; ++i) add_to(sums[i], of_tile[i], LANES);
    }
    double total[3] = {};
    for (int i = 0; i < 3; ++i)
        for (int lane = 0; lane < LANES; ++lane) total[i] += sums[i][lane];
    auto put = [&](double number) {
        *out = number;
        out += n;
    };
    put(total[0] != total[0] && max != INF ? std::numeric_limits<double>::quiet_NaN() : max);
    put(at_t ? total[2] : total[0]);
    const int64_t column = label - first_column;
    put(column >= 0 && column < columns ? rest[column] : -INF);
    put(double(find(rest, columns, max) + first_column));
    if (at_t) put(total[0]);
    put(total[1]);
}

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

template <bool SAFELY, Kind KIND>
void add_both(Columns at, int first, int end, Lanes* total, const Scalars& row, const Settings& k) {
    Both sums = {};
    for (int v = first; v < end; v += LANES) {
        F y = load(at.s + v) - at.s_base, x = load(at.t + v) - at.t_base, r;
        shift(y, x, r, row, k);
        Both of = divergence<SAFELY, KIND>(k, x, y, r, SAFELY ? exp_safe(y) : exp_any(y));
        I inside = (x != -INF) | (y != -INF);
        sums.value += SAFELY ? of.value : inside ? of.value : splat(0.0f);
        sums.slope += SAFELY ? of.slope : inside ? of.slope : splat(0.0f);
    }
    add_to(total[0], sums.value, end - first);
    add_to(total[1], sums.slope, end - first);
}

template <bool SAFELY, Kind KIND, class S>
void write_gradient(
    Columns at, int first, int end, S* out, int label_column, const Scalars& of_row, const Settings& settings
) {
    const Scalars row = of_row;  // copies, because `out` may alias whatever is behind a reference
    const Settings k = settings;
    const bool at_t = k.inverse_temperature != 1.0f;
    for (int v = first; v < end; v += LANES) {
        F y_at_1 = load(at.s + v) - at.s_base, gradient = {}, q = {};
        if (row.of_divergence != 0.0f) {
            F x = load(at.t + v) - at.t_base, y = y_at_1, r;
            shift(y, x, r, row, k);
            q = SAFELY ? exp_safe(y) : exp_any(y);
            F slope = divergence<SAFELY, KIND>(k, x, y, r, q).slope;
            if (!SAFELY) slope = (x != -INF) | (y != -INF) ? slope : splat(0.0f);
            gradient = (slope - q * row.slope_sum) * row.of_divergence;
        }
        if (row.of_cross_entropy != 0.0f) {
            if (at_t || row.of_divergence == 0.0f) {
                F z = y_at_1 - row.q_log_at_1;
                q = SAFELY ? exp_safe(z) : exp_any(z);
            }
            F one = lanes() == label_column - v ? splat(1.0f) : splat(0.0f);
            gradient += (q - one) * row.of_cross_entropy;
        }
        store(out + v, gradient);
    }
}

template <bool LABELS>
AddRecord adds_record(const Settings& k) {
    if (k.num_parts == 0) return {add_record<true, LABELS, NONE>, add_record<false, LABELS, NONE>};
    if (k.num_parts == 1) return {add_record<true, LABELS, FIRST>, add_record<false, LABELS, FIRST>};
    return {add_record<true, LABELS, ALL>, add_record<false, LABELS, ALL>};
}

// Calls `with` with the kind of the divergence in `k` as a constant.
template <class With>
void by_kind(const Settings& k, With with) {
    switch (k.num_parts == 1 ? k.parts[0].kind : SEVERAL) {
        case ALPHA_BETA: return with(std::integral_constant<Kind, ALPHA_BETA>());
        case TODI: return with(std::integral_constant<Kind, TODI>());
        case SKEW_FORWARD: return with(std::integral_constant<Kind, SKEW_FORWARD>());
        case SKEW_REVERSE: return with(std::integral_constant<Kind, SKEW_REVERSE>());
        case JENSEN_SHANNON: return with(std::integral_constant<Kind, JENSEN_SHANNON>());
        case TOTAL_VARIATION: return with(std::integral_constant<Kind, TOTAL_VARIATION>());
        default: return with(std::integral_constant<Kind, SEVERAL>());
    }
}

// Sums of value and slope.
template <class S, class T>
void second_row(
    double (&sum)[2], const S* s, const T* t, int64_t columns, const Scalars& row, const AddBoth& pass,
    const Settings& k
) {
    const float limit = limit_below(row, k);
    Lanes total[2] = {};
    for (int64_t c = 0; c < columns; c += TILE) {
        const Tile tile(s + c, t + c, columns - c, row.s_base, row.t_base, limit);
        tile.run(pass.safely, pass.anyhow, total, row, k);
    }
    for (int i = 0; i < 2; ++i)
        for (int lane = 0; lane < LANES; ++lane) sum[i] += total[i][lane];
}

template <class S, class T>
void gradient_row(
    S* out, const S* s, const T* t, int64_t columns, int64_t label_column, const Scalars& row,
    const WriteGradient<S>& pass, const Settings& k
) {
    if (row.of_divergence == 0.0f && row.of_cross_entropy == 0.0f) {
        std::memset(static_cast<void*>(out), 0, sizeof(S) * columns);
        return;
    }
    const float limit = limit_below(row, k);
    for (int64_t c = 0; c < columns; c += TILE) {
        const Tile tile(s + c, t + c, columns - c, row.s_base, row.t_base, limit);
        const int label = label_column >= c && label_column - c < TILE ? int(label_column - c) : -1;
        (tile.safe ? pass.safely : pass.anyhow)(tile.all, 0, tile.whole, out + c, label, row, k);
        if (tile.whole == tile.count) continue;
        S rest[TILE];  // a whole vector would end outside of the row
        (tile.last_safe ? pass.safely : pass.anyhow)(tile.last, tile.whole, tile.count, rest, label, row, k);
        std::memcpy(static_cast<void*>(out + c + tile.whole), rest + tile.whole, sizeof(S) * (tile.count - tile.whole));
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
    const AddRecord pass = labels ? adds_record<true>(k) : adds_record<false>(k);
    by_dtype(student, teacher, [&](auto* s, auto* t) {
        const int64_t s_stride = student.row_stride, t_stride = teacher.row_stride;
#pragma omp parallel for num_threads(k.threads) if (k.threads > 1)
        for (int64_t row = 0; row < n; ++row) {
            auto *s_row = s + row * s_stride, *s_next = s_row + s_stride;
            auto *t_row = t + row * t_stride, *t_next = t_row + t_stride;
            if (labels)
                record_row<true>(
                    record + row, n, s_row, t_row, s_next, t_next, columns, first_column, labels + row, pass, k
                );
            else
                record_row<false>(
                    record + row, n, s_row, t_row, s_next, t_next, columns, first_column, nullptr, pass, k
                );
        }
    });
}

// `record` is [fields, n] and `of_kept` [num_kept, n], rows `stride` apart; `kept` is [n, num_kept].
extern "C" void abkd_rest(
    double* record, double* of_kept, int64_t stride, Logits student, const int64_t* labels, const int64_t* kept,
    int64_t num_kept, int64_t n, int64_t columns, int64_t first_column, float inverse_temperature, int32_t threads
) {
    auto with = [&](auto* s) {
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            std::vector<float> rest(columns);
#pragma omp for
            for (int64_t row = 0; row < n; ++row)
                rest_row(
                    record + row, of_kept + row, stride, s + row * student.row_stride, columns, first_column,
                    labels[row], kept + row * num_kept, num_kept, rest.data(), inverse_temperature
                );
        }
    };
    student.is_bf16 ? with(static_cast<const bf16*>(student.first)) : with(static_cast<const float*>(student.first));
}

// Writes `values` [number, n] to those of `at` [n, number] that are columns; of several of one column the first.
extern "C" void abkd_write_columns(
    void* out, int64_t out_stride, int32_t is_bf16, const int64_t* at, const float* values, int64_t number, int64_t n,
    int64_t columns
) {
    auto with = [&](auto* rows) {
        using S = std::remove_pointer_t<decltype(rows)>;
        for (int64_t row = 0; row < n; ++row)
            for (int64_t i = number - 1; i >= 0; --i) {
                const int64_t column = at[row * number + i];
                if (column < 0 || column >= columns) continue;
                if constexpr (std::is_same_v<S, float>)
                    rows[row * out_stride + column] = values[i * n + row];
                else {
                    bf16 rounded[LANES];
                    store(rounded, splat(values[i * n + row]));
                    rows[row * out_stride + column] = rounded[0];
                }
            }
    };
    is_bf16 ? with(static_cast<bf16*>(out)) : with(static_cast<float*>(out));
}

// `values` and `slopes` are [n] or null; `scalars` is [4, n], contiguous, as in eager.local_second_record.
extern "C" void abkd_second_record(
    double* values, double* slopes, Logits student, Logits teacher, int64_t n, int64_t columns, const double* scalars,
    const Settings* settings
) {
    const Settings& k = *settings;
    AddBoth pass = {};
    by_kind(k, [&](auto kind) { pass = {add_both<true, kind>, add_both<false, kind>}; });
    by_dtype(student, teacher, [&](auto* s, auto* t) {
#pragma omp parallel for num_threads(k.threads) if (k.threads > 1)
        for (int64_t row = 0; row < n; ++row) {
            auto scalar = [&](int i) { return scalars[i * n + row]; };
            Scalars of = {};
            of.s_base = scalar(0), of.q_log = scalar(1), of.t_base = scalar(2), of.p_log = scalar(3);
            of.log_shift = scalar(3) - scalar(1);
            double sum[2] = {};
            second_row(sum, s + row * student.row_stride, t + row * teacher.row_stride, columns, of, pass, k);
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
        using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
        auto* rows = static_cast<S*>(out);
        WriteGradient<S> pass = {};
        by_kind(k, [&](auto kind) { pass = {write_gradient<true, kind, S>, write_gradient<false, kind, S>}; });
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
                label >= 0 && column >= 0 && column < columns ? column : -1, of, pass, k
            );
        }
    });
}
