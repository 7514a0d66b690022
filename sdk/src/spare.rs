//! Memory of batches that are written, kept for the next ones: it is mapped and warm already.

use std::sync::{Mutex, PoisonError};

use bytes::{Bytes, BytesMut};

use crate::limits;

#[derive(Debug, Default)]
pub(crate) struct Spare {
    buffers: Mutex<Vec<BytesMut>>,
}

impl Spare {
    /// An empty buffer.
    pub(crate) fn take(&self) -> BytesMut {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    /// Keeps the memory of `bytes`, unless somebody else still uses it.
    pub(crate) fn take_back(&self, bytes: Bytes) {
        let Ok(buffer) = bytes.try_into_mut() else { return };
        if buffer.capacity() > limits::SPARE_SIZE_MAX {
            return;
        }
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        if buffers.len() < limits::SPARE_COUNT_MAX {
            buffers.push(buffer);
        }
    }
}
