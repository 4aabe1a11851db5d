// The names under which a node is looked up: domain, opset of the graph, operator. Not built here.
#ifndef QCOMPILE_PLUGINS_OPSETS_H
#define QCOMPILE_PLUGINS_OPSETS_H

#include <vector>

#include "graph/ascend_string.h"

// Whole strings, put together by the compiler: `strings libqcompile_onnx_plugin.so | grep ai.onnx` then lists them.
#define QCOMPILE_ORIGINS(op)                                                                                        \
  std::vector<ge::AscendString> {                                                                                   \
    ge::AscendString("ai.onnx::11::" op), ge::AscendString("ai.onnx::12::" op), ge::AscendString("ai.onnx::13::" op), \
        ge::AscendString("ai.onnx::14::" op), ge::AscendString("ai.onnx::15::" op),                                   \
        ge::AscendString("ai.onnx::16::" op), ge::AscendString("ai.onnx::17::" op),                                   \
        ge::AscendString("ai.onnx::18::" op)                                                                          \
  }

#endif
