// FFCV includes all of OpenCV and uses these two modules. With this header in front, the two modules' development
// packages (14 Debian packages) do in place of libopencv-dev (over 200, 640 MB).
#include <opencv2/core.hpp>
#include <opencv2/imgproc.hpp>
