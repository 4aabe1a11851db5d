#ifndef STAND_IN_OPERATOR_H
#define STAND_IN_OPERATOR_H
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "graph/ascend_string.h"

namespace ge {
class Operator {
 public:
  struct State {
    std::string name, type;
    size_t num_inputs = 0;
    std::map<std::string, std::string> attributes, inputs;
    std::vector<std::string> registered;
  };
  std::shared_ptr<State> state = std::make_shared<State>();

  size_t GetInputsSize() const { return state->num_inputs; }
  void SetAttr(const char *name, int64_t value) { state->attributes[name] = "int:" + std::to_string(value); }
  void SetAttr(const char *name, float value) { state->attributes[name] = "float:" + std::to_string(value); }
  void SetAttr(const char *name, const AscendString &value) {
    state->attributes[name] = std::string("string:") + value.GetString();
  }
  graphStatus GetAttr(const char *name, int64_t &value) const { return Get(name, "int:", [&](const std::string &t) { value = std::stoll(t); }); }
  graphStatus GetAttr(const char *name, float &value) const { return Get(name, "float:", [&](const std::string &t) { value = std::stof(t); }); }
  graphStatus GetAttr(const char *name, AscendString &value) const { return Get(name, "string:", [&](const std::string &t) { value = AscendString(t.c_str()); }); }
  void DynamicInputRegister(const char *name, uint32_t count) { state->registered.push_back(std::string(name) + "*" + std::to_string(count)); }
  void DynamicOutputRegister(const char *name, uint32_t count) { state->registered.push_back(std::string(name) + "*" + std::to_string(count)); }
  Operator &SetInput(const char *name, const Operator &source) {
    state->inputs[name] = source.state->name;
    return *this;
  }

 private:
  template <typename Take>
  graphStatus Get(const char *name, const std::string &kind, Take take) const {
    const auto found = state->attributes.find(name);
    if (found == state->attributes.end() || found->second.rfind(kind, 0) != 0) return GRAPH_FAILED;
    take(found->second.substr(kind.size()));
    return GRAPH_SUCCESS;
  }
};
}  // namespace ge
#endif
