// Attributes of the ONNX node that is being parsed. Not built here.
//
// GE hands a node's attributes over as one string of JSON, {"attribute": [{"name": "epsilon", "f": "1e-05"}, ...]}: numbers
// bare or quoted, strings plain or in base64, as protobuf's JSON has bytes.
#ifndef QCOMPILE_PLUGINS_ATTRIBUTES_H
#define QCOMPILE_PLUGINS_ATTRIBUTES_H

#include <cstdint>
#include <cstdlib>
#include <string>

#include "graph/operator.h"

namespace qcompile {

// The value of `key` in the object of attribute `name`, quotes taken off; "" when there is none.
inline std::string FindAttribute(const std::string &json, const std::string &name, const std::string &key) {
  const std::string quoted = "\"" + name + "\"";
  for (size_t at = json.find(quoted); at != std::string::npos; at = json.find(quoted, at + 1)) {
    const size_t colon = json.find_last_not_of(" \t\r\n", at - 1);
    if (colon == std::string::npos || json[colon] != ':') continue;  // the name of something else
    const size_t begin = json.rfind('{', at), end = json.find('}', at);
    if (begin == std::string::npos || end == std::string::npos) return "";
    const std::string object = json.substr(begin, end - begin);
    size_t value = object.find("\"" + key + "\"");
    if (value == std::string::npos) return "";
    value = object.find(':', value);
    if (value == std::string::npos) return "";
    value = object.find_first_not_of(" \t\r\n", value + 1);
    if (value == std::string::npos) return "";
    if (object[value] == '"') {
      const size_t close = object.find('"', value + 1);
      return close == std::string::npos ? "" : object.substr(value + 1, close - value - 1);
    }
    return object.substr(value, object.find_first_of(",} \t\r\n", value) - value);
  }
  return "";
}

inline std::string DecodeBase64(const std::string &text) {
  static const std::string kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes;
  uint32_t word = 0;
  int bits = 0;
  for (const char c : text) {
    if (c == '=') break;
    const size_t digit = kDigits.find(c);
    if (digit == std::string::npos) return "";
    word = word << 6 | static_cast<uint32_t>(digit);
    bits += 6;
    if (bits >= 8) {
      bits -= 8;
      bytes.push_back(static_cast<char>(word >> bits & 0xFF));
    }
  }
  return bytes;
}

class Attributes {
 public:
  explicit Attributes(const ge::Operator &node) {
    ge::AscendString text;
    if (node.GetAttr("attribute", text) == ge::GRAPH_SUCCESS && text.GetString() != nullptr) json_ = text.GetString();
  }

  // Each returns false when the node has no such attribute, or when its value is no number.
  bool Float(const char *name, float &value) const {
    const std::string text = FindAttribute(json_, name, "f");
    char *end = nullptr;
    const float number = std::strtof(text.c_str(), &end);
    if (text.empty() || *end != '\0') return false;
    value = number;
    return true;
  }
  bool Int(const char *name, int64_t &value) const {
    const std::string text = FindAttribute(json_, name, "i");
    char *end = nullptr;
    const long long number = std::strtoll(text.c_str(), &end, 10);
    if (text.empty() || *end != '\0') return false;
    value = number;
    return true;
  }
  // Plain or in base64: whichever is one of two known words.
  bool Word(const char *name, const std::string &one, const std::string &other, std::string &value) const {
    const std::string text = FindAttribute(json_, name, "s");
    for (const std::string &spelt : {text, DecodeBase64(text)}) {
      if (spelt == one || spelt == other) {
        value = spelt;
        return true;
      }
    }
    return false;
  }

 private:
  std::string json_;
};

}  // namespace qcompile

#endif
