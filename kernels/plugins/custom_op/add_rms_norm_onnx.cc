// The ONNX node QcompileAddRmsNorm (x, residual, gamma) -> (y, h), attribute epsilon, to the operator. Not built here.
#include "attributes.h"
#include "opsets.h"
#include "register/register.h"

namespace domi {

static Status ParseAddRmsNorm(const ge::Operator &node, ge::Operator &op) {
  float epsilon = 0.0f;
  if (!qcompile::Attributes(node).Float("epsilon", epsilon)) return FAILED;
  op.SetAttr("epsilon", epsilon);
  return SUCCESS;
}

REGISTER_CUSTOM_OP("QcompileAddRmsNorm")
    .FrameworkType(ONNX)
    .OriginOpType(QCOMPILE_ORIGINS("QcompileAddRmsNorm"))
    .ParseParamsByOperatorFn(ParseAddRmsNorm)
    .ImplyType(ImplyType::TVM);

}  // namespace domi
