#ifndef STAND_IN_GRAPH_H
#define STAND_IN_GRAPH_H
#include <utility>
#include <vector>

#include "graph/operator.h"

namespace ge {
class Graph {
 public:
  std::vector<Operator> inputs;
  std::vector<std::pair<Operator, std::vector<size_t>>> outputs;
  Graph &SetInputs(const std::vector<Operator> &given) {
    inputs = given;
    return *this;
  }
  Graph &SetOutputs(const std::vector<std::pair<Operator, std::vector<size_t>>> &given) {
    outputs = given;
    return *this;
  }
};
}  // namespace ge
#endif
