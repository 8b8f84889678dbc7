package import Virtqueue

/// Why a device stopped serving its guest until the driver resets it.
package enum DeviceFault: Error, Equatable {
  /// The driver broke a virtqueue.
  case virtqueue(VirtqueueFault)
  /// The guest's memory cannot be mapped: the domain is going away, or the host is out of resources.
  case memory

  /// One line for the operator.
  package var message: String {
    switch self {
    case .virtqueue(let fault): "the guest's driver broke its virtqueue: \(fault.message)"
    case .memory: "the guest's memory cannot be mapped"
    }
  }
}
