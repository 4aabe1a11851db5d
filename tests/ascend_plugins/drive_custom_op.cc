/* Runs the custom operator against stand-ins: Compile from argv[1], through Serialize and Deserialize, and one Execute. */
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "acl/acl_rt.h"
#include "graph/custom_op.h"

ge::BaseCustomOp *MakeQcompileAddRmsNorm();

extern "C" {
int rtGetC2cCtrlAddr(uint64_t *address, uint32_t *length) {
  *address = 0x1111;
  *length = 8;
  return 0;
}
aclError aclrtBinaryLoadFromData(const void *data, size_t size, const aclrtBinaryLoadOptions *, aclrtBinHandle *handle) {
  printf("load %.*s\n", static_cast<int>(size), static_cast<const char *>(data));
  *handle = handle;
  return 0;
}
aclError aclrtBinaryGetFunction(aclrtBinHandle, const char *name, aclrtFuncHandle *function) {
  printf("function %s\n", name);
  *function = function;
  return 0;
}
aclError aclrtLaunchKernelWithHostArgs(aclrtFuncHandle, uint32_t blocks, void *, void *, void *data, size_t size, void *, size_t) {
  const char *bytes = static_cast<const char *>(data);
  uint64_t pointers[8];
  int32_t numbers[8];
  memcpy(pointers, bytes, sizeof(pointers));
  memcpy(numbers, bytes + sizeof(pointers), sizeof(numbers));
  float epsilon;
  memcpy(&epsilon, &numbers[4], 4);
  printf("launch blocks=%u size=%zu pointers", blocks, size);
  for (uint64_t pointer : pointers) printf(" %llx", static_cast<unsigned long long>(pointer));
  printf(" numbers %d %d %d %d %g %d %d %d\n", numbers[0], numbers[1], numbers[2], numbers[3], epsilon, numbers[5], numbers[6], numbers[7]);
  return 0;
}
aclError aclrtBinaryUnLoad(aclrtBinHandle) {
  printf("unload\n");
  return 0;
}
}

int main(int argc, char **argv) {
  const int64_t rows = argc > 1 ? atoll(argv[1]) : 1, columns = argc > 2 ? atoll(argv[2]) : 1;
  std::vector<uint8_t> buffer;
  gert::OpCompileContext compiling;
  for (auto &input : compiling.inputs) input.shape.shape.dims = {rows, columns};
  {
    std::unique_ptr<ge::BaseCustomOp> op(MakeQcompileAddRmsNorm());
    const bool compiled = dynamic_cast<ge::CompilableOp &>(*op).Compile(&compiling) == ge::GRAPH_SUCCESS;
    const bool kept = dynamic_cast<ge::PortableOp &>(*op).Serialize(buffer) == ge::GRAPH_SUCCESS;
    printf("compile %s serialize %s\n", compiled ? "ok" : "failed", kept ? "ok" : "failed");
    if (!compiled) return 0;
  }
  std::unique_ptr<ge::BaseCustomOp> op(MakeQcompileAddRmsNorm());
  dynamic_cast<ge::PortableOp &>(*op).Deserialize(buffer);
  gert::EagerOpExecutionContext context;
  for (size_t i = 0; i < 3; i++) {
    context.inputs[i].shape.shape.dims = {rows, columns};
    context.inputs[i].address = reinterpret_cast<void *>(0xa0 + i);
  }
  for (size_t i = 0; i < 2; i++) context.outputs[i].address = reinterpret_cast<void *>(0xb0 + i);
  context.attributes.epsilon = 0.25f;
  for (int step = 0; step < 2; step++)
    printf("execute %s\n", dynamic_cast<ge::EagerExecuteOp &>(*op).Execute(&context) == ge::GRAPH_SUCCESS ? "ok" : "failed");
  return 0;
}
