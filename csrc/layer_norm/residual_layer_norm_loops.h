// A row goes through both parts while it is in the first cache level.

#include "common/residual.h"
#include "layer_norm/layer_norm_loops.h"
