#pragma once
#include <libaio.h>
