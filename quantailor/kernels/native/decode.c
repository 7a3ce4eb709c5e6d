// Few tokens times a packed weight: see rows.h.

#include <stdlib.h>

#include "rows.h"

// x [T, N] float32, bias [O] or NULL -> y [T, O]. Returns 0, or 1 where memory ran out. Rows of weights stay in the first cache while all
// tokens are multiplied with them.
int32_t decode(const float *x, int64_t rows, const weight *w, const float *bias, float *y) {
    const int64_t bytes = token_bytes(w->kind, w->n), runs = (w->out + 15) / 16;
    char *memory = malloc((size_t)(rows * (bytes + (int64_t)sizeof(token)) + 1));
    if (!memory) return 1;
    token *tokens = (token *)memory;
    char *room = memory + rows * (int64_t)sizeof(token);
    for (int64_t t = 0; t < rows; t++) {
        tokens[t] = token_at(room + t * bytes, w->kind, w->n);
        prepare_token(x + t * w->n, w, tokens + t);
    }
#pragma omp parallel for schedule(static)
    for (int64_t run = 0; run < runs; run++) {
        int64_t from = run * 16, to = from + 16 < w->out ? from + 16 : w->out;
        for (int64_t t = 0; t < rows; t++) times_rows(w, tokens + t, bias, from, to, y + t * w->out);
    }
    free(memory);
    return 0;
}
