# The update of running statistics, for the other compiled modules.
cimport numpy as cnp


cpdef object move_running(cnp.ndarray mean, cnp.ndarray var, cnp.ndarray counter, cnp.ndarray batch_mean,
                          cnp.ndarray batch_m2, double count, momentum, bint unbiased=*, tuple old=*,
                          dict attributes=*, saved=*, cnp.ndarray skipped=*)
