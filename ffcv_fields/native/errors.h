// libjpeg's errors end the call that they occur in, and nothing is printed.

#ifndef ERRORS_H
#define ERRORS_H

#include <setjmp.h>

#include "crop.h"

typedef struct {
  struct jpeg_error_mgr manager;
  jmp_buf leave;  // where an error leads
} ErrorManager;

static void leave_on_error(j_common_ptr info) { longjmp(((ErrorManager *)info->err)->leave, 1); }
static void say_nothing(j_common_ptr info) { (void)info; }

// The manager with libjpeg's own for the rest; `on_message` hears warnings (level -1) and traces.
static struct jpeg_error_mgr *errors(ErrorManager *error, void (*on_message)(j_common_ptr info, int level)) {
  jpeg_std_error(&error->manager);
  error->manager.error_exit = leave_on_error;
  error->manager.output_message = say_nothing;
  error->manager.emit_message = on_message;
  return &error->manager;
}

#endif
