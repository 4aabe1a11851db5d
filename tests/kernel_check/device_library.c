/* What the device library's functions do, for replaying memory-planned IR on a CPU in program order.

   Written from the functions' names, signatures and use in the IR; the vendor's bitcode cannot run here. An operand of size 1
   in a dimension where the result is larger is broadcast. Masks (i1) are packed, eight to a byte. Scratch operands are filled
   with 0xFF before anything is computed: a plan that puts scratch on live data gives wrong numbers. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef _Float16 half;
typedef uint16_t bits16; /* bfloat16; passed in a register as half is, since this C has no such type */

typedef struct { void *base, *data; int64_t offset, sizes[1], strides[1]; } Rank1;
typedef struct { void *base, *data; int64_t offset, sizes[2], strides[2]; } Rank2;
typedef struct { void *base, *data; int64_t offset, sizes[3], strides[3]; } Rank3;

/* A view of any rank up to 3: missing leading dimensions have size 1. */
typedef struct { char *data; int64_t offset, n[3], s[3]; } View;

static View view(void *base, int64_t offset, const int64_t *sizes, const int64_t *strides, int rank) {
  View v = {base, offset, {1, 1, 1}, {0, 0, 0}};
  for (int d = 0; d < rank; d++) {
    v.n[3 - rank + d] = sizes[d];
    v.s[3 - rank + d] = strides[d];
  }
  return v;
}
#define V(m, rank) view((m)->data, (m)->offset, (m)->sizes, (m)->strides, rank)

static int64_t place(const View *v, int64_t i, int64_t j, int64_t k) {
  return v->offset + (v->n[0] == 1 ? 0 : i) * v->s[0] + (v->n[1] == 1 ? 0 : j) * v->s[1] + (v->n[2] == 1 ? 0 : k) * v->s[2];
}
static int bit(const View *v, int64_t at) { return (v->data[at >> 3] >> (at & 7)) & 1; }
static void set_bit(View *v, int64_t at, int value) {
  if (value) v->data[at >> 3] |= (char)(1 << (at & 7));
  else v->data[at >> 3] &= (char)~(1 << (at & 7));
}
static float widen(bits16 b) {
  uint32_t word = (uint32_t)b << 16;
  float f;
  memcpy(&f, &word, 4);
  return f;
}
static bits16 narrow(float f) { /* to nearest, ties to even */
  uint32_t word;
  memcpy(&word, &f, 4);
  if ((word & 0x7fffffff) > 0x7f800000) return (bits16)(word >> 16 | 64);
  return (bits16)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
static bits16 bits_of(half h) {
  bits16 b;
  memcpy(&b, &h, 2);
  return b;
}

#define EACH(v) \
  for (int64_t i = 0; i < (v).n[0]; i++) \
    for (int64_t j = 0; j < (v).n[1]; j++) \
      for (int64_t k = 0; k < (v).n[2]; k++)
#define AT(type, v) ((type *)(v).data)[place(&(v), i, j, k)]
#define BIT(v) bit(&(v), place(&(v), i, j, k))
#define SCRATCH(type, m) \
  do { \
    for (int64_t t = 0; t < (m)->sizes[0]; t++) memset((type *)(m)->data + (m)->offset + t * (m)->strides[0], 0xFF, sizeof(type)); \
  } while (0)
#define FN(name) void _mlir_ciface_##name

/* moves */
#define MOVES(rank, suffix, T, PAD) \
  FN(load_gm_to_ubuf_##rank##d_##suffix)(Rank##rank *from, Rank##rank *to, int32_t mode, PAD pad, int64_t left) { \
    View a = V(from, rank), d = V(to, rank); \
    (void)mode, (void)pad, (void)left; \
    EACH(a) AT(T, d) = AT(T, a); \
  } \
  FN(store_ubuf_to_gm_##rank##d_##suffix)(Rank##rank *from, Rank##rank *to, int32_t atomic) { \
    View a = V(from, rank), d = V(to, rank); \
    (void)atomic; \
    EACH(a) AT(T, d) = AT(T, a); \
  } \
  FN(copy_ubuf_to_ubuf_##rank##d_##suffix)(Rank##rank *from, Rank##rank *to, int32_t mode, PAD pad) { \
    View a = V(from, rank), d = V(to, rank); \
    (void)mode, (void)pad; \
    EACH(a) AT(T, d) = AT(T, a); \
  }
#define MOVES_OF(suffix, T, PAD) MOVES(1, suffix, T, PAD) MOVES(2, suffix, T, PAD) MOVES(3, suffix, T, PAD)
MOVES_OF(float, float, float)
MOVES_OF(half, half, half)
MOVES_OF(bfloat16_t, bits16, half)
MOVES_OF(int8_t, int8_t, int8_t)
MOVES_OF(int32_t, int32_t, int32_t)

#define FILL(rank, suffix, T, S, value) \
  FN(broadcast_scalar_##suffix##_to_##rank##d)(S x, Rank##rank *to) { \
    View d = V(to, rank); \
    EACH(d) AT(T, d) = (value); \
  }
#define FILL_OF(suffix, T, S, value) FILL(1, suffix, T, S, value) FILL(2, suffix, T, S, value) FILL(3, suffix, T, S, value)
FILL_OF(float, float, float, x)
FILL_OF(half, half, half, x)
FILL_OF(bfloat16_t, bits16, half, bits_of(x))
FILL_OF(int8_t, int8_t, int8_t, x)
FILL_OF(int32_t, int32_t, int32_t, x)
FN(broadcast_scalar_bool_to_1d)(int8_t x, Rank1 *to) {
  View d = V(to, 1);
  EACH(d) set_bit(&d, place(&d, i, j, k), x & 1);
}
#define SPREAD(suffix, T) \
  FN(broadcast_first_axis_align_2d_##suffix)(Rank2 *from, Rank2 *to) { \
    View a = V(from, 2), d = V(to, 2); \
    EACH(d) AT(T, d) = AT(T, a); \
  } \
  FN(broadcast_last_axis_align_2d_##suffix)(Rank2 *from, Rank2 *to, Rank1 *scratch) { \
    View a = V(from, 2), d = V(to, 2); \
    SCRATCH(T, scratch); \
    EACH(d) AT(T, d) = AT(T, a); \
  }
SPREAD(half, half)
SPREAD(float, float)
FN(arange_1d_int32_t)(Rank1 *to, int64_t first, int64_t step) {
  View d = V(to, 1);
  EACH(d) AT(int32_t, d) = (int32_t)(first + k * step);
}

/* arithmetic: two operands, or one and a number */
#define BINARY(name, rank, suffix, T, value) \
  FN(name##_##rank##d_##suffix)(Rank##rank *left, Rank##rank *right, Rank##rank *to, Rank1 *scratch) { \
    View a = V(left, rank), b = V(right, rank), d = V(to, rank); \
    SCRATCH(T, scratch); \
    EACH(d) { \
      T x = AT(T, a), y = AT(T, b); \
      AT(T, d) = (value); \
    } \
  }
#define SCALAR(name, rank, suffix, T, value) \
  FN(name##_vs_##rank##d_##suffix)(Rank##rank *left, T y, Rank##rank *to, Rank1 *scratch) { \
    View a = V(left, rank), d = V(to, rank); \
    SCRATCH(T, scratch); \
    EACH(d) { \
      T x = AT(T, a); \
      AT(T, d) = (value); \
    } \
  }
#define ARITHMETIC(rank, suffix, T, MAX, MIN) \
  BINARY(vadd, rank, suffix, T, x + y) BINARY(vsub, rank, suffix, T, x - y) BINARY(vmul, rank, suffix, T, x * y) \
  BINARY(vdiv, rank, suffix, T, x / y) BINARY(vmax, rank, suffix, T, MAX(x, y)) BINARY(vmin, rank, suffix, T, MIN(x, y)) \
  SCALAR(vadds, rank, suffix, T, x + y) SCALAR(vsubs, rank, suffix, T, x - y) SCALAR(vmuls, rank, suffix, T, x * y) \
  SCALAR(vdiv, rank, suffix, T, x / y) SCALAR(vmaxs, rank, suffix, T, MAX(x, y)) SCALAR(vmins, rank, suffix, T, MIN(x, y))
static int32_t larger(int32_t x, int32_t y) { return x > y ? x : y; }
static int32_t smaller(int32_t x, int32_t y) { return x < y ? x : y; }
ARITHMETIC(1, float, float, fmaxf, fminf)
ARITHMETIC(2, float, float, fmaxf, fminf)
ARITHMETIC(3, float, float, fmaxf, fminf)
ARITHMETIC(1, int32_t, int32_t, larger, smaller)
ARITHMETIC(2, int32_t, int32_t, larger, smaller)
BINARY(vand, 1, int32_t, int32_t, x &y)
BINARY(vand, 2, int32_t, int32_t, x &y)
BINARY(vand, 3, int32_t, int32_t, x &y)
#define SHIFT(rank) \
  FN(vshrs_vs_##rank##d_int32_t)(Rank##rank *left, int32_t y, Rank##rank *to) { \
    View a = V(left, rank), d = V(to, rank); \
    EACH(d) AT(int32_t, d) = AT(int32_t, a) >> y; \
  }
SHIFT(1) SHIFT(2) SHIFT(3)

#define UNARY(name, rank, value) \
  FN(name##_##rank##d_float)(Rank##rank *from, Rank##rank *to, Rank1 *scratch) { \
    View a = V(from, rank), d = V(to, rank); \
    SCRATCH(float, scratch); \
    EACH(d) { \
      float x = AT(float, a); \
      AT(float, d) = (value); \
    } \
  }
#define UNARY_OF(name, value) UNARY(name, 1, value) UNARY(name, 2, value) UNARY(name, 3, value)
UNARY_OF(vabs, fabsf(x))
UNARY_OF(vexp, expf(x))
UNARY_OF(vln, logf(x))
UNARY_OF(vsqrt, sqrtf(x))
UNARY_OF(vrsqrt, 1.0f / sqrtf(x))
UNARY_OF(vrec, 1.0f / x)

/* comparisons and choices */
#define COMPARE(name, op, suffix, T) \
  FN(vcmp_##name##_1d_##suffix)(Rank1 *left, Rank1 *right, Rank1 *to) { \
    View a = V(left, 1), b = V(right, 1), d = V(to, 1); \
    EACH(a) set_bit(&d, place(&d, i, j, k), AT(T, a) op AT(T, b)); \
  } \
  FN(vcmps_##name##_1d_##suffix)(Rank1 *left, T y, Rank1 *to) { \
    View a = V(left, 1), d = V(to, 1); \
    EACH(a) set_bit(&d, place(&d, i, j, k), AT(T, a) op y); \
  }
#define COMPARE_OF(suffix, T) \
  COMPARE(eq, ==, suffix, T) COMPARE(ne, !=, suffix, T) COMPARE(lt, <, suffix, T) COMPARE(le, <=, suffix, T) \
  COMPARE(gt, >, suffix, T) COMPARE(ge, >=, suffix, T)
COMPARE_OF(float, float)
COMPARE_OF(half, half)
COMPARE_OF(int32_t, int32_t)
FN(vnot_1d_bool)(Rank1 *from, Rank1 *to, Rank1 *scratch) {
  View a = V(from, 1), d = V(to, 1);
  (void)scratch;
  EACH(d) set_bit(&d, place(&d, i, j, k), !BIT(a));
}
#define LOGIC(name, op) \
  FN(name##_1d_bool)(Rank1 *left, Rank1 *right, Rank1 *to, Rank1 *scratch) { \
    View a = V(left, 1), b = V(right, 1), d = V(to, 1); \
    (void)scratch; \
    EACH(d) set_bit(&d, place(&d, i, j, k), BIT(a) op BIT(b)); \
  }
LOGIC(vand, &&)
LOGIC(vor, ||)
#define CHOOSE(suffix, T) \
  FN(vsel_vs_1d_##suffix)(Rank1 *mask, Rank1 *left, T y, Rank1 *to, Rank1 *scratch) { \
    View c = V(mask, 1), a = V(left, 1), d = V(to, 1); \
    SCRATCH(T, scratch); \
    EACH(d) AT(T, d) = BIT(c) ? AT(T, a) : y; \
  } \
  FN(vsel_sv_1d_##suffix)(Rank1 *mask, T x, Rank1 *right, Rank1 *to, Rank1 *scratch) { \
    View c = V(mask, 1), b = V(right, 1), d = V(to, 1); \
    SCRATCH(T, scratch); \
    EACH(d) AT(T, d) = BIT(c) ? x : AT(T, b); \
  } \
  FN(vsel_vv_1d_bool_##suffix)(Rank1 *mask, Rank1 *left, Rank1 *right, Rank1 *to, Rank1 *scratch) { \
    View c = V(mask, 1), a = V(left, 1), b = V(right, 1), d = V(to, 1); \
    SCRATCH(T, scratch); \
    EACH(d) AT(T, d) = BIT(c) ? AT(T, a) : AT(T, b); \
  }
CHOOSE(float, float)
CHOOSE(int32_t, int32_t)

/* conversions; modes 0 to 4 are to nearest even, half away from zero, up, down, towards zero */
#define CAST(from_name, F, to_name, T, rank, value) \
  FN(vcast_##from_name##_to_##to_name##_##rank##d_with_mode)(Rank##rank *from, Rank##rank *to, int32_t mode) { \
    View a = V(from, rank), d = V(to, rank); \
    (void)mode; \
    EACH(d) { \
      F x = AT(F, a); \
      AT(T, d) = (value); \
    } \
  }
#define CAST_OF(from_name, F, to_name, T, value) \
  CAST(from_name, F, to_name, T, 1, value) CAST(from_name, F, to_name, T, 2, value) CAST(from_name, F, to_name, T, 3, value)
static float rounded(float x, int32_t mode) {
  return mode == 0 ? rintf(x) : mode == 1 ? roundf(x) : mode == 2 ? ceilf(x) : mode == 3 ? floorf(x) : truncf(x);
}
CAST_OF(half, half, float, float, (float)x)
CAST_OF(float, float, half, half, (half)x)
CAST_OF(bfloat16_t, bits16, float, float, widen(x))
CAST_OF(float, float, bfloat16_t, bits16, narrow(x))
CAST_OF(int8_t, int8_t, half, half, (half)x)
CAST_OF(int32_t, int32_t, float, float, (float)x)
CAST_OF(float, float, int32_t, int32_t, (int32_t)rounded(x, mode))
FN(vcast_int32_t_to_int8_t_1d_with_overflow)(Rank1 *from, Rank1 *to, Rank1 *scratch, int32_t mode) {
  View a = V(from, 1), d = V(to, 1);
  (void)mode;
  SCRATCH(int32_t, scratch);
  EACH(d) AT(int8_t, d) = (int8_t)AT(int32_t, a);
}
#define FROM_BOOL(suffix, T) \
  FN(vcast_bool_to_##suffix##_1d_with_temp)(Rank1 *from, Rank1 *to, Rank1 *scratch, int32_t mode) { \
    View a = V(from, 1), d = V(to, 1); \
    (void)mode; \
    SCRATCH(T, scratch); \
    EACH(d) AT(T, d) = (T)BIT(a); \
  }
FROM_BOOL(half, half)
FROM_BOOL(float, float)
FROM_BOOL(int32_t, int32_t)

/* reductions over the dimensions in which the result has size 1; sums in double, since the device's order is not known */
#define REDUCE(name, rank, suffix, T, ACC, first, step) \
  FN(name##_##suffix)(Rank##rank *from, Rank##rank *to, Rank1 *scratch, T initial) { \
    View a = V(from, rank), d = V(to, rank); \
    (void)initial; \
    SCRATCH(T, scratch); \
    EACH(d) { \
      ACC sum = (first); \
      for (int64_t p = i; p < (d.n[0] == 1 ? a.n[0] : i + 1); p++) \
        for (int64_t q = j; q < (d.n[1] == 1 ? a.n[1] : j + 1); q++) \
          for (int64_t r = k; r < (d.n[2] == 1 ? a.n[2] : k + 1); r++) { \
            ACC x = ((T *)a.data)[place(&a, p, q, r)]; \
            sum = (step); \
          } \
      AT(T, d) = (T)sum; \
    } \
  }
#define REDUCE_OF(kind, suffix, T, ACC, first, step) \
  REDUCE(reduce_##kind##_r, 1, suffix, T, ACC, first, step) \
  REDUCE(reduce_##kind##_ar, 2, suffix, T, ACC, first, step) \
  REDUCE(reduce_##kind##_ra, 2, suffix, T, ACC, first, step) \
  REDUCE(reduce_##kind##_ara, 3, suffix, T, ACC, first, step) \
  REDUCE(enablevc_reduce_##kind##_r, 1, suffix, T, ACC, first, step) \
  REDUCE(enablevc_reduce_##kind##_ar, 2, suffix, T, ACC, first, step)
REDUCE_OF(sum, float, float, double, 0, sum + x)
REDUCE_OF(max, float, float, float, -INFINITY, fmaxf(sum, x))
REDUCE_OF(min, float, float, float, INFINITY, fminf(sum, x))
REDUCE_OF(sum, int32_t, int32_t, int32_t, 0, sum + x)
REDUCE_OF(max, int32_t, int32_t, int32_t, INT32_MIN, larger(sum, x))
REDUCE_OF(min, int32_t, int32_t, int32_t, INT32_MAX, smaller(sum, x))
