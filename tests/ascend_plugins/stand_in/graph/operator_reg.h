#ifndef STAND_IN_OPERATOR_REG_H
#define STAND_IN_OPERATOR_REG_H
#include <initializer_list>

namespace ge {
enum DataType { DT_FLOAT = 0, DT_FLOAT16 = 1, DT_BF16 = 27 };
struct TensorType {
  TensorType(std::initializer_list<DataType>) {}
};
}  // namespace ge
/* a prototype is a chain of calls on an object; the names in it are only names */
struct Prototype {
  Prototype &Port(const char *, const ge::TensorType &) { return *this; }
  Prototype &Attribute(const char *, double) { return *this; }
};
#define REG_OP(name) static Prototype prototype_##name = Prototype()
#define INPUT(name, types) Port(#name, types)
#define OUTPUT(name, types) Port(#name, types)
#define ATTR(name, kind, value) Attribute(#name, value)
#define OP_END_FACTORY_REG(name) Port(#name, ge::TensorType({}));
#endif
