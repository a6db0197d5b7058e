// Two requests that wait for one batch.
#include "transfer/transfer_engine.h"

void Take(prehoc::TransferRequest request) { request.Wait().IgnoreError(); }

void Use(prehoc::TransferRequest& request) {
#ifdef PREHOC_MUST_NOT_COMPILE
  Take(request);
#else
  Take(std::move(request));
#endif
}
