from llvmlite import ir

RETCODE_USEREXC: ir.Constant
