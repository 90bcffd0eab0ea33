// What bias_dropout_add does with a row.

#include "common/residual.h"
