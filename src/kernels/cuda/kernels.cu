// All kernels in one translation unit, so that one fat binary holds them.

#include "rows.cu"
#include "norm.cu"
#include "activation.cu"
#include "rotary.cu"
#include "varlen_attention.cu"
#include "flash_attention.cu"
#include "decode_attention.cu"
#include "sampling.cu"
