/* Stand-ins for the few classes of CANN's headers that the plugins use: enough to compile them and to see what they do. */
#ifndef STAND_IN_ASCEND_STRING_H
#define STAND_IN_ASCEND_STRING_H
#include <string>

namespace ge {
class AscendString {
 public:
  AscendString() = default;
  AscendString(const char *text) : text_(text) {}
  const char *GetString() const { return text_.c_str(); }

 private:
  std::string text_;
};
using graphStatus = unsigned int;
constexpr graphStatus GRAPH_SUCCESS = 0, GRAPH_FAILED = 1;
}  // namespace ge
#endif
