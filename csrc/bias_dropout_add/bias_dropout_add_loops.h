// What bias_dropout_add does with a row, and the sums of rows.

#include "common/column_sums.h"
#include "common/residual.h"
