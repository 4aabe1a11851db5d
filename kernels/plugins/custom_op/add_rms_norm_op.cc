// The Triton kernel kernels/add_rms_norm as an operator of an .om, through GE's custom operators (CANN 9.1 and newer).
// Not built here.
//
// ATC calls Compile, which reads the .npubin that make_npubin.py made, and Serialize, which puts it into the .om. The device
// calls Deserialize when the .om is loaded and Execute at each step, which launches the binary.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "acl/acl_rt.h"
#include "add_rms_norm_op.h"
#include "graph/custom_op.h"

// Of the runtime library: the address through which cube and vector cores wait for each other.
extern "C" int rtGetC2cCtrlAddr(uint64_t *address, uint32_t *length);

namespace {

constexpr const char *kFunction = "add_rms_norm_kernel";
constexpr int64_t kVectorCores = 40;  // Ascend910B4; 48 on 910B1 and 910B2
// The tile that make_npubin.py compiles for rows up to so many columns: kernels/add_rms_norm/tiles.toml.
struct Tile {
  int64_t columns, rows;
};
constexpr Tile kTiles[] = {{1024, 4}, {2048, 2}, {4096, 1}, {8192, 1}};

const Tile *TileFor(int64_t columns) {
  for (const Tile &tile : kTiles)
    if (columns <= tile.columns) return &tile;
  return nullptr;
}

const char *TypeName(ge::DataType type) {
  switch (type) {
    case ge::DT_FLOAT16: return "fp16";
    case ge::DT_BF16: return "bf16";
    case ge::DT_FLOAT: return "fp32";
    default: return nullptr;
  }
}

// What the kernel's entry takes, in the order of its signature; Triton-Ascend's own launcher packs the same.
struct __attribute__((packed)) Arguments {
  void *ffts __attribute__((aligned(8)));
  void *sync_block_lock __attribute__((aligned(8)));
  void *workspace __attribute__((aligned(8)));
  const void *x __attribute__((aligned(8)));
  const void *residual __attribute__((aligned(8)));
  const void *gamma __attribute__((aligned(8)));
  void *y __attribute__((aligned(8)));
  void *h __attribute__((aligned(8)));
  int32_t num_rows __attribute__((aligned(4)));
  int32_t num_columns __attribute__((aligned(4)));
  int32_t x_stride __attribute__((aligned(4)));
  int32_t residual_stride __attribute__((aligned(4)));
  float epsilon __attribute__((aligned(4)));
  int32_t grid_x __attribute__((aligned(4)));
  int32_t grid_y __attribute__((aligned(4)));
  int32_t grid_z __attribute__((aligned(4)));
};

}  // namespace

class QcompileAddRmsNorm : public ge::EagerExecuteOp,
                           public ge::ShapeInferOp,
                           public ge::CompilableOp,
                           public ge::PortableOp {
 public:
  ge::graphStatus InferShape(gert::InferShapeContext *context) override {
    const gert::Shape *x = context->GetInputShape(0);
    if (x == nullptr) return ge::GRAPH_FAILED;
    for (size_t output = 0; output < 2; ++output) *context->GetOutputShape(output) = *x;
    return ge::GRAPH_SUCCESS;
  }

  ge::graphStatus InferDataType(gert::InferDataTypeContext *context) override {
    for (size_t output = 0; output < 2; ++output)
      if (context->SetOutputDataType(output, context->GetInputDataType(0)) != ge::GRAPH_SUCCESS) return ge::GRAPH_FAILED;
    return ge::GRAPH_SUCCESS;
  }

  // $QCOMPILE_NPUBIN/add_rms_norm_kernel.<type>.<columns of the tile>.npubin
  ge::graphStatus Compile(gert::OpCompileContext *context) override {
    const gert::Tensor *x = context->GetInputTensor(0);
    const char *folder = std::getenv("QCOMPILE_NPUBIN");
    if (x == nullptr || folder == nullptr) return ge::GRAPH_FAILED;
    const gert::Shape &shape = x->GetShape().GetStorageShape();
    const Tile *tile = TileFor(shape.GetDim(shape.GetDimNum() - 1));
    const char *type = TypeName(x->GetDataType());
    if (tile == nullptr || type == nullptr) return ge::GRAPH_FAILED;
    const std::string name = std::string(kFunction) + "." + type + "." + std::to_string(tile->columns) + ".npubin";
    std::ifstream file(std::string(folder) + "/" + name, std::ios::binary);
    binary_.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    return binary_.empty() ? ge::GRAPH_FAILED : ge::GRAPH_SUCCESS;
  }

  ge::graphStatus Serialize(std::vector<uint8_t> &buffer) override {
    buffer = binary_;
    return binary_.empty() ? ge::GRAPH_FAILED : ge::GRAPH_SUCCESS;
  }

  ge::graphStatus Deserialize(const std::vector<uint8_t> &buffer) override {
    binary_ = buffer;
    return binary_.empty() ? ge::GRAPH_FAILED : ge::GRAPH_SUCCESS;
  }

  ge::graphStatus Execute(gert::EagerOpExecutionContext *context) override {
    const gert::Tensor *inputs[3];
    for (size_t index = 0; index < 3; ++index) {
      inputs[index] = context->GetInputTensor(index);
      if (inputs[index] == nullptr) return ge::GRAPH_FAILED;
    }
    const gert::Tensor *x = inputs[0];
    gert::Tensor *outputs[2];
    for (size_t index = 0; index < 2; ++index) {
      outputs[index] = context->MallocOutputTensor(index, x->GetShape(), x->GetFormat(), x->GetDataType());
      if (outputs[index] == nullptr) return ge::GRAPH_FAILED;
    }
    const gert::Shape &shape = x->GetShape().GetStorageShape();
    const int64_t columns = shape.GetDim(shape.GetDimNum() - 1), rows = x->GetShapeSize() / columns;
    const Tile *tile = TileFor(columns);
    if (tile == nullptr || rows > INT32_MAX) return ge::GRAPH_FAILED;
    const int64_t blocks = std::min(kVectorCores, (rows + tile->rows - 1) / tile->rows);
    const float *epsilon = context->GetAttrs()->GetFloat(0);
    uint64_t ffts = 0;
    uint32_t length = 0;
    if (epsilon == nullptr || rtGetC2cCtrlAddr(&ffts, &length) != 0) return ge::GRAPH_FAILED;
    const int32_t num_rows = static_cast<int32_t>(rows), num_columns = static_cast<int32_t>(columns);
    // a vector kernel neither locks nor has a workspace: `qcompile kernels check add_rms_norm` says so
    Arguments arguments = {reinterpret_cast<void *>(ffts), nullptr, nullptr, x->GetAddr(), inputs[1]->GetAddr(),
                           inputs[2]->GetAddr(), outputs[0]->GetAddr(), outputs[1]->GetAddr(), num_rows, num_columns,
                           num_columns, num_columns, *epsilon, static_cast<int32_t>(blocks), 1, 1};
    aclrtFuncHandle function = nullptr;
    if (!Load(&function)) return ge::GRAPH_FAILED;
    const aclError error = aclrtLaunchKernelWithHostArgs(function, static_cast<uint32_t>(blocks), context->GetStream(),
                                                         nullptr, &arguments, sizeof(arguments), nullptr, 0);
    return error == ACL_ERROR_NONE ? ge::GRAPH_SUCCESS : ge::GRAPH_FAILED;
  }

  ~QcompileAddRmsNorm() override {
    if (handle_ != nullptr) (void)aclrtBinaryUnLoad(handle_);
  }

 private:
  // Once: a step must not wait for the binary to be loaded again.
  bool Load(aclrtFuncHandle *function) {
    if (function_ == nullptr) {
      aclrtBinaryLoadOption option;
      option.type = ACL_RT_BINARY_LOAD_OPT_MAGIC;
      option.value.magic = ACL_RT_BINARY_MAGIC_ELF_VECTOR_CORE;
      aclrtBinaryLoadOptions options;
      options.options = &option;
      options.numOpt = 1;
      if (aclrtBinaryLoadFromData(binary_.data(), binary_.size(), &options, &handle_) != ACL_ERROR_NONE) return false;
      if (aclrtBinaryGetFunction(handle_, kFunction, &function_) != ACL_ERROR_NONE) return false;
    }
    *function = function_;
    return true;
  }

  std::vector<uint8_t> binary_;
  aclrtBinHandle handle_ = nullptr;
  aclrtFuncHandle function_ = nullptr;
};

REG_AUTO_MAPPING_OP(QcompileAddRmsNorm);
