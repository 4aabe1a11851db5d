#ifndef STAND_IN_ACL_RT_H
#define STAND_IN_ACL_RT_H
#include <cstddef>
#include <cstdint>

using aclError = int;
using aclrtBinHandle = void *;
using aclrtFuncHandle = void *;
constexpr aclError ACL_ERROR_NONE = 0;
enum { ACL_RT_BINARY_LOAD_OPT_MAGIC = 2 };
constexpr uint32_t ACL_RT_BINARY_MAGIC_ELF_VECTOR_CORE = 0x41415246;
struct aclrtBinaryLoadOption {
  int type;
  union {
    uint32_t magic;
  } value;
};
struct aclrtBinaryLoadOptions {
  aclrtBinaryLoadOption *options;
  size_t numOpt;
};
extern "C" {
aclError aclrtBinaryLoadFromData(const void *, size_t, const aclrtBinaryLoadOptions *, aclrtBinHandle *);
aclError aclrtBinaryGetFunction(aclrtBinHandle, const char *, aclrtFuncHandle *);
aclError aclrtLaunchKernelWithHostArgs(aclrtFuncHandle, uint32_t, void *, void *, void *, size_t, void *, size_t);
aclError aclrtBinaryUnLoad(aclrtBinHandle);
}
#endif
