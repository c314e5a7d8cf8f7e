//! How query, key and value heads lie in one fused projection.

use candle_core::{Result, bail};

/// The columns of a fused `[N, (H + 2K)·D]` projection: `H` query heads, then `K` key heads, then `K` value heads.
///
/// Query head `h` attends with key and value head `h / (H / K)`: for 12 query and 4 key/value heads of 64, the
/// buffer is 1,280 wide, the keys begin at column 768, the values at 1,024, and query heads 3, 4 and 5 share key head 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLayout {
    /// Query heads, `H`.
    pub num_heads: usize,
    /// Key heads, and as many value heads, `K`; divides `H`.
    pub num_kv_heads: usize,
    /// Width of one head, `D`.
    pub head_dim: usize,
}

impl HeadLayout {
    /// Query heads that share one key head, `H / K`.
    pub fn group_size(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// Width of all query heads, `H·D`, which is the width of the attention's output too.
    pub fn query_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Width of all key heads, or of all value heads, `K·D`.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Width of the fused buffer, `(H + 2K)·D`.
    pub fn qkv_width(&self) -> usize {
        self.query_width() + 2 * self.kv_width()
    }

    /// Fails unless the heads form whole groups and `qkv` has this layout's width; returns `N`.
    pub(super) fn check_qkv(&self, qkv: &[usize]) -> Result<usize> {
        if self.num_kv_heads == 0 || self.head_dim == 0 || self.group_size() * self.num_kv_heads != self.num_heads {
            bail!("{self:?}: query heads have to be a multiple of key/value heads, and none of the three zero");
        }
        match *qkv {
            [tokens, width] if width == self.qkv_width() => Ok(tokens),
            _ => bail!("expected a [N, {}] buffer for {self:?}, got {qkv:?}", self.qkv_width()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_of_the_documented_example() {
        let heads = HeadLayout { num_heads: 12, num_kv_heads: 4, head_dim: 64 };
        assert_eq!((heads.group_size(), heads.query_width(), heads.kv_width()), (3, 768, 256));
        assert_eq!(heads.qkv_width(), 1280);
    }

    #[test]
    fn broken_layouts_are_refused() {
        for (num_heads, num_kv_heads, head_dim) in [(12, 5, 64), (12, 0, 64), (12, 4, 0), (2, 4, 8)] {
            let heads = HeadLayout { num_heads, num_kv_heads, head_dim };
            assert!(heads.check_qkv(&[3, 1280]).is_err(), "{heads:?}");
        }
        let heads = HeadLayout { num_heads: 12, num_kv_heads: 4, head_dim: 64 };
        assert!(heads.check_qkv(&[3, 1280]).is_ok());
        assert!(heads.check_qkv(&[3, 1279]).is_err());
        assert!(heads.check_qkv(&[1280]).is_err());
    }
}
