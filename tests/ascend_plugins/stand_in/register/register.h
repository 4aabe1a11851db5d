#ifndef STAND_IN_REGISTER_H
#define STAND_IN_REGISTER_H
#include <functional>
#include <string>
#include <vector>

#include "graph/graph.h"
#include "graph/operator.h"

namespace domi {
using Status = unsigned int;
constexpr Status SUCCESS = 0, FAILED = 1;
enum FrameworkType { CAFFE = 0, TENSORFLOW = 3, ONNX = 5 };
enum class ImplyType { TVM = 1 };

class OpRegistrationData {
 public:
  explicit OpRegistrationData(const char *ge_op) : ge_op(ge_op) {}
  OpRegistrationData &FrameworkType(const domi::FrameworkType &type) {
    framework = type;
    return *this;
  }
  OpRegistrationData &OriginOpType(const std::vector<ge::AscendString> &types) {
    origins = types;
    return *this;
  }
  OpRegistrationData &ParseParamsByOperatorFn(const std::function<Status(const ge::Operator &, ge::Operator &)> &fn) {
    parse = fn;
    return *this;
  }
  OpRegistrationData &ParseOpToGraphFn(const std::function<Status(const ge::Operator &, ge::Graph &)> &fn) {
    to_graph = fn;
    return *this;
  }
  OpRegistrationData &ImplyType(const domi::ImplyType &) { return *this; }

  std::string ge_op;
  domi::FrameworkType framework = CAFFE;
  std::vector<ge::AscendString> origins;
  std::function<Status(const ge::Operator &, ge::Operator &)> parse;
  std::function<Status(const ge::Operator &, ge::Graph &)> to_graph;
};

inline std::vector<OpRegistrationData> &Registered() {
  static std::vector<OpRegistrationData> all;
  return all;
}
struct Receiver {
  Receiver(const OpRegistrationData &data) { Registered().push_back(data); }
};
}  // namespace domi

#define STAND_IN_JOIN(a, b) a##b
#define STAND_IN_RECEIVER(count, name) static domi::Receiver STAND_IN_JOIN(receiver, count) = domi::OpRegistrationData(name)
#define REGISTER_CUSTOM_OP(name) STAND_IN_RECEIVER(__COUNTER__, name)
#endif
