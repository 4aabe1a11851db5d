/* memrefCopy, which MLIR's lowering of strided copies calls; Debian's packages carry no library with it. */
#include <stdint.h>
#include <string.h>

typedef struct { int64_t rank; void *descriptor; } Unranked;

static void copy(const char *from, const int64_t *from_strides, char *to, const int64_t *to_strides, const int64_t *sizes,
                 int64_t rank, int64_t element) {
  if (rank == 0) {
    memcpy(to, from, element);
    return;
  }
  for (int64_t i = 0; i < sizes[0]; i++)
    copy(from + i * from_strides[0] * element, from_strides + 1, to + i * to_strides[0] * element, to_strides + 1,
         sizes + 1, rank - 1, element);
}

/* A descriptor is {allocated, aligned, offset, sizes[rank], strides[rank]}, eight bytes each. */
void memrefCopy(int64_t element, Unranked *source, Unranked *target) {
  int64_t rank = source->rank, *s = source->descriptor, *t = target->descriptor;
  copy((char *)s[1] + s[2] * element, s + 3 + rank, (char *)t[1] + t[2] * element, t + 3 + rank, s + 3, rank, element);
}
