// NPUApplyRotaryPosEmb (query, key, cos, sin) -> (query, key), to GE's ApplyRotaryPosEmb. Not built here.
//
// layout 1 is BSND, the only one the kernel of the 910B takes; halves are turned against each other (rotary_mode "half", which
// is the default where the attribute exists at all).
#include "attributes.h"
#include "opsets.h"
#include "register/register.h"

namespace domi {

static Status ParseApplyRotaryPosEmb(const ge::Operator &node, ge::Operator &op) {
  int64_t layout = 1;
  qcompile::Attributes(node).Int("layout", layout);
  if (layout != 1) return FAILED;
  op.SetAttr("layout", layout);
  return SUCCESS;
}

REGISTER_CUSTOM_OP("ApplyRotaryPosEmb")
    .FrameworkType(ONNX)
    .OriginOpType(QCOMPILE_ORIGINS("NPUApplyRotaryPosEmb"))
    .ParseParamsByOperatorFn(ParseApplyRotaryPosEmb)
    .ImplyType(ImplyType::TVM);

}  // namespace domi
