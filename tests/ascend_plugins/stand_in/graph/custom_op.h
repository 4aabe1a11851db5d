#ifndef STAND_IN_CUSTOM_OP_H
#define STAND_IN_CUSTOM_OP_H
#include <cstddef>
#include <cstdint>
#include <vector>

#include "graph/ascend_string.h"
#include "graph/operator_reg.h"

namespace gert {
struct Shape {
  std::vector<int64_t> dims;
  size_t GetDimNum() const { return dims.size(); }
  int64_t GetDim(size_t index) const { return dims.at(index); }
};
struct StorageShape {
  Shape shape;
  const Shape &GetStorageShape() const { return shape; }
};
struct StorageFormat {};
struct Tensor {
  StorageShape shape;
  StorageFormat format;
  ge::DataType type = ge::DT_FLOAT16;
  void *address = nullptr;
  const StorageShape &GetShape() const { return shape; }
  const StorageFormat &GetFormat() const { return format; }
  ge::DataType GetDataType() const { return type; }
  void *GetAddr() const { return address; }
  int64_t GetShapeSize() const {
    int64_t size = 1;
    for (int64_t dim : shape.shape.dims) size *= dim;
    return size;
  }
};
struct Attributes {
  float epsilon = 0;
  const float *GetFloat(size_t) const { return &epsilon; }
};
struct InferShapeContext {
  Shape input, outputs[2];
  const Shape *GetInputShape(size_t) { return &input; }
  Shape *GetOutputShape(size_t index) { return &outputs[index]; }
};
struct InferDataTypeContext {
  ge::DataType type = ge::DT_FLOAT16, outputs[2] = {};
  ge::DataType GetInputDataType(size_t) { return type; }
  ge::graphStatus SetOutputDataType(size_t index, ge::DataType given) {
    outputs[index] = given;
    return ge::GRAPH_SUCCESS;
  }
};
struct OpCompileContext {
  Tensor inputs[3];
  const Tensor *GetInputTensor(size_t index) { return &inputs[index]; }
};
struct EagerOpExecutionContext {
  Tensor inputs[3], outputs[2];
  Attributes attributes;
  const Tensor *GetInputTensor(size_t index) { return &inputs[index]; }
  Tensor *MallocOutputTensor(size_t index, const StorageShape &, const StorageFormat &, ge::DataType) { return &outputs[index]; }
  const Attributes *GetAttrs() { return &attributes; }
  void *GetStream() { return nullptr; }
};
}  // namespace gert

namespace ge {
struct BaseCustomOp {
  virtual ~BaseCustomOp() = default;
};
struct EagerExecuteOp : virtual BaseCustomOp {
  virtual graphStatus Execute(gert::EagerOpExecutionContext *) = 0;
};
struct ShapeInferOp : virtual BaseCustomOp {
  virtual graphStatus InferShape(gert::InferShapeContext *) = 0;
  virtual graphStatus InferDataType(gert::InferDataTypeContext *) = 0;
};
struct CompilableOp : virtual BaseCustomOp {
  virtual graphStatus Compile(gert::OpCompileContext *) = 0;
};
struct PortableOp : virtual BaseCustomOp {
  virtual graphStatus Serialize(std::vector<uint8_t> &) = 0;
  virtual graphStatus Deserialize(const std::vector<uint8_t> &) = 0;
};
}  // namespace ge
#define REG_AUTO_MAPPING_OP(name) \
  ge::BaseCustomOp *Make##name() { return new name(); }
#endif
