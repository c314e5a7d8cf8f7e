//! The `mistral-batch` program: everything is in the library.

use std::process::ExitCode;

use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// `mi_option_purge_delay` of mimalloc.h, versions 2 and 3: the crate has no name for it.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Has freed memory given back at once: mimalloc keeps it for a tenth of a second, in which rows of long texts are many megabytes.
fn give_back_freed_memory() {
    // SAFETY: sets a number that the allocator reads.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, 0) };
}

fn main() -> ExitCode {
    mistral_batch::job::on_memory_limit(give_back_freed_memory);
    mistral_batch::cli::main()
}
