// A trace takes literals: what is only known at run time, such as a prompt, is refused.
#include "base/trace.h"

void Trace(prehoc::Tracer* tracer, const char* prompt) {
  const prehoc::TraceScope fine(tracer, "literal");
#ifdef PREHOC_MUST_NOT_COMPILE
  const prehoc::TraceScope wrong(tracer, prompt);
#else
  static_cast<void>(prompt);
#endif
}
