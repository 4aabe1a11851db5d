// NPUFusedInferAttentionScore (query, key, value, atten_mask?) -> (attention_out), to GE's FusedInferAttentionScore. Not built
// here.
//
// The kernel takes key and value as lists of tensors, and has pse_shift between them and the mask: no order of ONNX inputs
// says that. So the node becomes a subgraph of one operator, whose inputs are set by name.
#include <string>
#include <vector>

#include "attributes.h"
#include "graph/graph.h"
#include "graph/operator_factory.h"
#include "opsets.h"
#include "register/register.h"

namespace domi {

namespace {
constexpr size_t kRequiredInputs = 3;
constexpr int64_t kAllTokens = 2147483647;
const char *const kOriginal = "ai.onnx::16::NPUFusedInferAttentionScore";
}  // namespace

static Status ParseFusedInferAttentionScore(const ge::Operator &node, ge::Operator &op) {
  const qcompile::Attributes attributes(node);
  int64_t num_heads = 0, num_key_value_heads = 0, sparse_mode = 0, inner_precise = 0;
  float scale = 1.0f;
  std::string input_layout;
  const size_t num_inputs = node.GetInputsSize();
  if (num_inputs < kRequiredInputs || num_inputs > kRequiredInputs + 1) return FAILED;
  if (!attributes.Int("num_heads", num_heads) || !attributes.Float("scale", scale)) return FAILED;
  if (!attributes.Word("input_layout", "BNSD", "BNSD_BSND", input_layout)) return FAILED;
  attributes.Int("num_key_value_heads", num_key_value_heads);
  attributes.Int("sparse_mode", sparse_mode);
  attributes.Int("inner_precise", inner_precise);
  op.DynamicInputRegister("x", static_cast<uint32_t>(num_inputs));
  op.DynamicOutputRegister("y", 1);
  op.SetAttr("original_type", ge::AscendString(kOriginal));
  op.SetAttr("input_size", static_cast<int64_t>(num_inputs));
  op.SetAttr("num_heads", num_heads);
  op.SetAttr("num_key_value_heads", num_key_value_heads);
  op.SetAttr("sparse_mode", sparse_mode);
  op.SetAttr("inner_precise", inner_precise);
  op.SetAttr("scale", scale);
  op.SetAttr("input_layout", ge::AscendString(input_layout.c_str()));
  return SUCCESS;
}

static Status FusedInferAttentionScoreToGraph(const ge::Operator &op, ge::Graph &graph) {
  int64_t num_inputs = 0;
  if (op.GetAttr("input_size", num_inputs) != ge::GRAPH_SUCCESS) return FAILED;
  ge::Operator attention = ge::OperatorFactory::CreateOperator("attention", "FusedInferAttentionScore");
  attention.DynamicInputRegister("key", 1);
  attention.DynamicInputRegister("value", 1);
  static const char *const kInputs[] = {"query", "key0", "value0", "atten_mask"};
  std::vector<ge::Operator> inputs;
  for (int64_t index = 0; index < num_inputs; ++index) {
    const std::string name = "data_" + std::to_string(index);
    ge::Operator data = ge::OperatorFactory::CreateOperator(name.c_str(), "Data");
    data.SetAttr("index", index);
    attention.SetInput(kInputs[index], data);
    inputs.push_back(data);
  }
  for (const char *name : {"num_heads", "num_key_value_heads", "sparse_mode", "inner_precise"}) {
    int64_t value = 0;
    if (op.GetAttr(name, value) != ge::GRAPH_SUCCESS) return FAILED;
    attention.SetAttr(name, value);
  }
  float scale = 1.0f;
  ge::AscendString input_layout;
  if (op.GetAttr("scale", scale) != ge::GRAPH_SUCCESS) return FAILED;
  if (op.GetAttr("input_layout", input_layout) != ge::GRAPH_SUCCESS) return FAILED;
  attention.SetAttr("scale", scale);
  attention.SetAttr("input_layout", input_layout);
  attention.SetAttr("pre_tokens", kAllTokens);
  attention.SetAttr("next_tokens", kAllTokens);
  std::vector<std::pair<ge::Operator, std::vector<size_t>>> outputs;
  outputs.emplace_back(attention, std::vector<size_t>{0});
  graph.SetInputs(inputs).SetOutputs(outputs);
  return SUCCESS;
}

REGISTER_CUSTOM_OP("PartitionedCall")
    .FrameworkType(ONNX)
    .OriginOpType(QCOMPILE_ORIGINS("NPUFusedInferAttentionScore"))
    .ParseParamsByOperatorFn(ParseFusedInferAttentionScore)
    .ParseOpToGraphFn(FusedInferAttentionScoreToGraph)
    .ImplyType(ImplyType::TVM);

}  // namespace domi
