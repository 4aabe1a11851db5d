// NPUSwiGlu (x) -> (y) with attribute dim, to GE's SwiGlu: silu of the first half times the second. Not built here.
#include "attributes.h"
#include "opsets.h"
#include "register/register.h"

namespace domi {

static Status ParseSwiGlu(const ge::Operator &node, ge::Operator &op) {
  int64_t dim = -1;
  qcompile::Attributes(node).Int("dim", dim);
  op.SetAttr("dim", dim);
  return SUCCESS;
}

REGISTER_CUSTOM_OP("SwiGlu")
    .FrameworkType(ONNX)
    .OriginOpType(QCOMPILE_ORIGINS("NPUSwiGlu"))
    .ParseParamsByOperatorFn(ParseSwiGlu)
    .ImplyType(ImplyType::TVM);

}  // namespace domi
