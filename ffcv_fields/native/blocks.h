// Step 2: the blocks of MCUs from their bits.
//
// One stretch of the stream at a time. Two of them at once, between whose restart markers nothing depends on the other,
// were tried: a fourth slower on an AMD EPYC of 2024, for want of registers, and because a mispredicted end of a block
// stops both.

#ifndef BLOCKS_H
#define BLOCKS_H

#include "bits.h"

#define RUN 4  // MCUs that are decoded before their blocks are transformed

// What all MCUs of a file have.
typedef struct {
  const HuffmanTable *dc[D_MAX_BLOCKS_IN_MCU], *ac[D_MAX_BLOCKS_IN_MCU];
  int component[D_MAX_BLOCKS_IN_MCU], blocks;
} Layout;

// The part of a stream that stays in registers while it is decoded.
typedef struct {
  Bits bits;
  const Look *look;  // of the AC table of the block at hand
  int16_t *block;
  int k;  // its last coefficient yet
} Place;

typedef struct {
  Place place;
  Source source;
  int last_dc[MAX_COMPONENTS], at;  // DC of the components' last blocks; the block's number in its MCU
  int to_do;                        // MCUs of the run that are left
} Stream;

static const uint8_t NATURAL_ORDER[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

enum { GOES_ON, RUN_IS_DONE, IS_DAMAGED };

// The DC coefficient of the block at hand.
static inline __attribute__((always_inline)) int begin_block(Place *p, Stream *s, const Layout *layout) {
  const HuffmanTable *dc = layout->dc[s->at];
  p->bits = refill(p->bits, &s->source);
  const Look look = dc->look[p->bits.buffer >> (64 - LOOK_BITS)];
  int value = look.value;
  if (__builtin_expect(look.bits != 0, 1)) {
    p->bits = drop(p->bits, look.bits);
  } else {
    Bits bits = p->bits;
    if (long_code(&bits, dc, look, 1, &value) < 0) return IS_DAMAGED;
    p->bits = bits;
  }
  int *last = &s->last_dc[layout->component[s->at]];
  *last = (int)((unsigned)*last + (unsigned)value);
  p->block[0] = (int16_t)*last;
  p->k = 0, p->look = layout->ac[s->at]->look;
  return GOES_ON;
}

// The last step of a block, or a long code; then the next block's DC coefficient.
static inline __attribute__((always_inline)) int leave_block(Place *p, Stream *s, const Layout *layout, Look look) {
  int k = p->k + look.step;
  if (__builtin_expect(look.bits == 0, 0)) {
    int value;
    Bits bits = refill(p->bits, &s->source);
    const int step = long_code(&bits, layout->ac[s->at], look, 0, &value);
    if (step < 0) return IS_DAMAGED;
    p->bits = bits, k = p->k + step;
    if (k <= 63) p->block[NATURAL_ORDER[k]] = (int16_t)value;
    if (k < 63) {
      p->k = k;
      return GOES_ON;
    }
  } else if (k >= 63) {  // the block is full, or ends here: a second coefficient would be the next one's
    p->bits = drop(p->bits, look.first_bits);
    if (k == 63) p->block[63] = look.value;
  } else {
    p->bits = drop(p->bits, look.bits);
    p->block[NATURAL_ORDER[k]] = look.value;
    if (k + look.second_step == 63) p->block[63] = look.second_value;
  }
  p->block += 64;
  if (++s->at == layout->blocks) {
    s->at = 0;
    if (p->bits.left < s->source.invented) return IS_DAMAGED;  // the data ended before
    if (--s->to_do == 0) return RUN_IS_DONE;
  }
  return begin_block(p, s, layout);
}

// A step of the block at hand; to `leave` if it may be the last one.
#define STEP()                                                                  \
  {                                                                             \
    look = p.look[p.bits.buffer >> (64 - LOOK_BITS)];                           \
    const int first = p.k + look.step, second = first + look.second_step;       \
    if (__builtin_expect(second >= 63, 0)) goto leave;                          \
    p.bits = drop(p.bits, look.bits);                                           \
    p.block[NATURAL_ORDER[first]] = look.value;                                 \
    p.block[NATURAL_ORDER[second]] = look.second_value;                         \
    p.k = second;                                                               \
  }

// The blocks [mcus, blocks of an MCU, 64] of the stream's next MCUs. Returns RUN_IS_DONE or IS_DAMAGED.
static int decode_run(Stream *s, const Layout *layout, int mcus, int16_t *blocks) {
  memset(blocks, 0, (size_t)mcus * (size_t)layout->blocks * sizeof(JBLOCK));
  Place p = s->place;
  Look look;
  p.block = blocks, s->to_do = mcus;
  int state = begin_block(&p, s, layout);
  while (state == GOES_ON) {
    p.bits = refill(p.bits, &s->source);
    STEP()
    STEP()
    STEP()
    STEP()
    STEP()
    continue;
  leave:
    state = leave_block(&p, s, layout, look);
  }
  s->place = p;
  return state;
}

#endif
