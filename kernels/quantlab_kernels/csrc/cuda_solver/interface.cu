// The functions that belong to no stage.

#include "interface.h"

#include <intrinsics.cuh>

QUANTLAB_EXPORT int quantlab_solver_probe() { return quantlab::probe(); }

QUANTLAB_EXPORT const char* quantlab_solver_error(int status) { return quantlab::error_string(status); }
