// See tables.h.

#include "tables.h"

int make_table(HuffmanTable *table, const JHUFF_TBL *from, int is_dc) {
  if (table->made && memcmp(table->from.bits, from->bits, sizeof from->bits) == 0 &&
      memcmp(table->from.huffval, from->huffval, sizeof from->huffval) == 0)
    return 1;
  table->from = *from, table->made = 0;
  for (int i = 0; i < 1 << LOOK_BITS; ++i) table->look[i] = (Look){0, 0, NOT_HERE, 0, 0, 0};
  int code = 0, at = 0;
  for (int length = 1; length <= 16; ++length, code <<= 1) {
    table->offset[length] = at - code;
    for (int i = 0; i < from->bits[length]; ++i, ++code, ++at) {
      if (at > 255 || code >= 1 << length || (is_dc && from->huffval[at] > 15)) return 0;
      const int symbol = from->huffval[at], size = symbol & 15, spare = LOOK_BITS - length - size;
      const uint8_t bits = (uint8_t)(length + size), step = (uint8_t)step_of(symbol, is_dc);
      if (spare < 0) {  // the value goes beyond: its size in place of it
        const Look code_alone = {0, (uint8_t)length, NOT_HERE, step, (int16_t)size, 0};
        for (int rest = 0; length <= LOOK_BITS && rest < 1 << (LOOK_BITS - length); ++rest)
          table->look[code << (LOOK_BITS - length) | rest] = code_alone;
        continue;
      }
      for (int rest = 0; rest < 1 << (size + spare); ++rest) {
        const int16_t value = (int16_t)(size ? extended(rest >> spare, size) : 0);
        table->look[code << (size + spare) | rest] = (Look){bits, bits, step, 0, value, value};
      }
    }
    if (from->bits[length] && code >= 1 << length) return 0;  // a code of ones alone, which libjpeg refuses
    table->greatest[length] = (code << (16 - length)) - 1;
  }
  table->greatest[17] = 0xFFFF;
  for (int i = (1 << LOOK_BITS) - 1; i >= 0 && !is_dc; --i) {  // the coefficient that follows, if it fits
    Look *first = &table->look[i];
    const Look second = table->look[(i << first->bits) & ((1 << LOOK_BITS) - 1)];
    if (first->bits == 0 || first->step == END_OF_BLOCK || second.bits == 0) continue;
    if (first->bits + second.first_bits > LOOK_BITS) continue;
    first->bits += second.first_bits, first->second_step = second.step, first->second_value = second.value;
  }
  return table->made = 1;
}
