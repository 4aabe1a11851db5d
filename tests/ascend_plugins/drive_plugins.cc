/* Lists what the plugins register, and runs their parsers on node texts from the command line: OP NUM_INPUTS JSON ... */
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "register/register.h"

static void Show(const ge::Operator &op) {
  for (const auto &entry : op.state->attributes) printf(" %s=%s", entry.first.c_str(), entry.second.c_str());
  for (const auto &entry : op.state->inputs) printf(" %s<-%s", entry.first.c_str(), entry.second.c_str());
  for (const auto &name : op.state->registered) printf(" %s", name.c_str());
  printf("\n");
}

int main(int argc, char **argv) {
  for (const auto &data : domi::Registered())
    for (const auto &origin : data.origins) printf("registered %s %d %s\n", data.ge_op.c_str(), data.framework, origin.GetString());
  for (int i = 1; i + 2 < argc; i += 3) {
    const std::string origin = std::string("ai.onnx::16::") + argv[i];
    for (const auto &data : domi::Registered()) {
      bool is_it = false;
      for (const auto &name : data.origins) is_it = is_it || origin == name.GetString();
      if (!is_it) continue;
      ge::Operator node, op;
      node.state->num_inputs = static_cast<size_t>(atoi(argv[i + 1]));
      if (strlen(argv[i + 2]) > 0) node.SetAttr("attribute", ge::AscendString(argv[i + 2]));
      const bool parsed = data.parse(node, op) == domi::SUCCESS;
      printf("parsed %s %s", argv[i], parsed ? "ok" : "failed");
      Show(op);
      ge::Graph graph;
      if (!parsed || !data.to_graph) continue;
      const bool made = data.to_graph(op, graph) == domi::SUCCESS;
      printf("graph %s %s %zu inputs %s", argv[i], made ? "ok" : "failed", graph.inputs.size(), graph.outputs.at(0).first.state->type.c_str());
      Show(graph.outputs.at(0).first);
    }
  }
  return 0;
}
