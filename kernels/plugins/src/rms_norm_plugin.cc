// NPURmsNormEpsilon (x, gamma) -> (y, rstd?) with attribute epsilon, to GE's RmsNorm. Not built here.
//
// CANN's own NPURmsNorm reads no attribute: its epsilon is 1e-6, whatever the model's is.
#include "attributes.h"
#include "opsets.h"
#include "register/register.h"

namespace domi {

static Status ParseRmsNorm(const ge::Operator &node, ge::Operator &op) {
  float epsilon = 0.0f;
  if (!qcompile::Attributes(node).Float("epsilon", epsilon)) return FAILED;
  op.SetAttr("epsilon", epsilon);
  return SUCCESS;
}

REGISTER_CUSTOM_OP("RmsNorm")
    .FrameworkType(ONNX)
    .OriginOpType(QCOMPILE_ORIGINS("NPURmsNormEpsilon"))
    .ParseParamsByOperatorFn(ParseRmsNorm)
    .ImplyType(ImplyType::TVM);

}  // namespace domi
