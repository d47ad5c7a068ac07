/* All kernels for one instruction set. The build compiles this file once per set, with its flags and its name. */
#include "attend.h"
#include "choose.h"
#include "halves.h"
#include "learn.h"
#include "move.h"

#define JOIN(a, b) a##b
#define TABLE(isa) JOIN(farkv_kernels_, isa)

const struct kernels TABLE(FARKV_ISA) = {attend,   select_records, gather,      learn,
                                        read_all, read_rows,      split_halves, join_halves};
