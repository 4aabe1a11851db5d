// The operator's prototype: what GE and the ONNX plugin below know of it. Not built here.
#ifndef QCOMPILE_ADD_RMS_NORM_OP_H
#define QCOMPILE_ADD_RMS_NORM_OP_H

#include "graph/operator_reg.h"

namespace ge {

REG_OP(QcompileAddRmsNorm)
    .INPUT(x, TensorType({DT_FLOAT16, DT_BF16, DT_FLOAT}))
    .INPUT(residual, TensorType({DT_FLOAT16, DT_BF16, DT_FLOAT}))
    .INPUT(gamma, TensorType({DT_FLOAT16, DT_BF16, DT_FLOAT}))
    .OUTPUT(y, TensorType({DT_FLOAT16, DT_BF16, DT_FLOAT}))
    .OUTPUT(h, TensorType({DT_FLOAT16, DT_BF16, DT_FLOAT}))
    .ATTR(epsilon, Float, 1e-6)
    .OP_END_FACTORY_REG(QcompileAddRmsNorm)

}  // namespace ge

#endif
