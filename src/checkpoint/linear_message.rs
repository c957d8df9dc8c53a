/*! A quantized linear as one message: its tensors one after the other, as they are stored. */

use std::borrow::Cow;

use super::linear::{from_tensors, specs, to_tensors};
use super::{Stored, TensorSpec};
use crate::Result;
use crate::quant::linear::QuantizedLinear;
use crate::quant::number::LinearFormat;

/// What a linear is called in a message.
const NAME: &str = "linear";

/// The message of a linear.
pub fn to_message(linear: &QuantizedLinear) -> Vec<u8> {
    to_tensors(NAME, linear).into_iter().flat_map(|(_, bytes)| bytes).collect()
}

/// A message, and the linear that it holds.
pub struct LinearMessage<'a> {
    /// Rows of the linear.
    pub rows: usize,
    /// How its weights are held.
    pub format: LinearFormat,
    /// The message.
    pub bytes: &'a [u8],
}

impl LinearMessage<'_> {
    /// The linear.
    ///
    /// # Errors
    /// An input error if the message holds no linear.
    pub fn linear(&self) -> Result<QuantizedLinear> {
        from_tensors(self, NAME, self.rows, &self.format)
    }
}

impl Stored for LinearMessage<'_> {
    fn fetch(&self, wanted: &TensorSpec) -> Result<Cow<'_, [u8]>> {
        let mut first = 0;
        for spec in specs(NAME, self.rows, &self.format) {
            let end = first + spec.bytes() as usize;
            if spec.name == wanted.name {
                return Ok(Cow::Borrowed(&self.bytes[first..end]));
            }
            first = end;
        }
        unreachable!("{} is not part of a linear", wanted.name)
    }
}
